//! The page size of a guest, which the state file of its snapshot may say.

use std::path::PathBuf;

use serde_json::json;

use crate::fixture::{Fixture, SIZE};

/// The beginning of a state file, as Firecracker 1.12 writes it.
fn vmstate(fixture: &Fixture, version: &str, pages: u32) -> PathBuf {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let parts = [
        0x0710_1984_8664_0000_u64.to_le_bytes().to_vec(),
        string(version),
        (SIZE >> 20).to_le_bytes().to_vec(),
        vec![0],
        3_u32.to_le_bytes().to_vec(),
        string("/vmlinux"),
        vec![0, 0],
        pages.to_le_bytes().to_vec(),
        vec![0; 4096],
    ];
    let path = fixture.folder.path().join("vmstate");
    std::fs::write(&path, parts.concat()).unwrap();
    path
}

#[test]
fn auto_gives_a_snapshot_with_two_mebibyte_pages_uffd_though_nobody_has_said_its_page_size() {
    let fixture = Fixture::new();
    let vmstate = vmstate(&fixture, "6.0.0", 1);
    let add = json!({ "mem_path": fixture.file.path(), "vmstate_path": vmstate });
    let template = fixture.send("PUT", "/v1/templates/t", &add).ok(201);
    assert_eq!(template["page_size"], 2 << 20);
    // The same again, and by who says it.
    fixture.send("PUT", "/v1/templates/t", &add).ok(200);
    let said = json!({ "mem_path": fixture.file.path(), "vmstate_path": vmstate, "page_size": 2 << 20 });
    fixture.send("PUT", "/v1/templates/t", &said).ok(200);
    let created = fixture.create(&json!({}));
    assert_eq!(created["backend"], "uffd", "{created:#}");
    fixture
        .try_create(&json!({ "backend": "file" }))
        .error(422, "backend_unavailable");
}

#[test]
fn a_page_size_that_is_only_guessed_is_told_with_the_way_out() {
    let fixture = Fixture::with(|_, settings| settings.connect_deadline = Some(std::time::Duration::from_millis(100)));
    for (version, pages) in [("10.0.0", 1), ("6.0.0", 7)] {
        let vmstate = vmstate(&fixture, version, pages);
        let add = json!({ "mem_path": fixture.file.path(), "vmstate_path": vmstate });
        assert_eq!(fixture.send("PUT", "/v1/templates/t", &add).ok(201)["page_size"], 4096);
        let created = fixture.create(&json!({ "id": "f" }));
        assert_eq!(created["backend"], "file");
        let reason = created["reason"].as_str().unwrap();
        assert!(reason.contains("--page-size 2M"), "{reason}");
        // Firecracker has refused, and told nobody but who asked it.
        let fork = fixture.await_fork("f", "failed");
        assert!(
            fork["error"]["message"].as_str().unwrap().contains("--page-size 2M"),
            "{fork:#}"
        );
        fixture.ask("DELETE", "/v1/forks/f").ok(204);
        fixture.ask("DELETE", "/v1/templates/t").ok(204);
    }
    // Where the state file says it, there is nothing to be guessed.
    let vmstate = vmstate(&fixture, "6.0.0", 0);
    let add = json!({ "mem_path": fixture.file.path(), "vmstate_path": vmstate });
    fixture.send("PUT", "/v1/templates/t", &add).ok(201);
    let created = fixture.create(&json!({}));
    assert!(
        !created["reason"].as_str().unwrap().contains("--page-size"),
        "{created:#}"
    );
}
