//! Templates that somebody changes while forks of them live: noticed, refused, and never a wrong byte.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use pagecast_testkit::sim_vmm::{MapFile, SimVmm};
use pagecast_testkit::skip::{Need, skip};
use rustix::fs::OFlags;
use rustix::thread::CapabilitySet;
use serde_json::{Value, json};

use crate::fixture::{Fixture, PATIENCE, ends_well, eventually, is_dead, reads_on, reads_right, start_writing, writes};

/// A template that is guarded by a lease. Says that the test is skipped where there are none.
fn leased() -> Option<Fixture> {
    let fixture = Fixture::new();
    if fixture.add_template()["guard"] == "lease" {
        return Some(fixture);
    }
    skip(Need::Leases);
    None
}

/// A template without a lease, as on a file system that has none: its file is another user's, and this process may not
/// take a lease on it.
fn watched() -> Option<Fixture> {
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to have a file of another user"));
        return None;
    }
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::LEASE);
    rustix::thread::set_capabilities(None, sets).unwrap();
    // Its threads can do no more than the one that starts them.
    let fixture = Fixture::new();
    std::os::unix::fs::chown(fixture.file.path(), Some(54_321), None).unwrap();
    assert_eq!(fixture.add_template()["guard"], "watch");
    Some(fixture)
}

fn first_byte(path: &Path) -> u8 {
    let mut byte = [0];
    File::open(path).unwrap().read_exact_at(&mut byte, 0).unwrap();
    byte[0]
}

/// The template cannot be forked, says why, and can be added again once it was removed.
#[track_caller]
fn cannot_be_forked(fixture: &Fixture, how: &str) {
    for backend in ["uffd", "file", "auto"] {
        let message = fixture
            .try_create(&json!({ "backend": backend }))
            .error(409, "template_changed");
        assert!(message.contains(how), "{message}");
    }
    let template = fixture.template();
    assert_eq!(template["state"], "changed", "{template:#}");
    assert!(template["changed"].as_str().unwrap().contains(how), "{template:#}");
    let add = json!({ "mem_path": fixture.file.path() });
    fixture
        .send("PUT", "/v1/templates/t", &add)
        .error(409, "template_changed");
}

/// The template is removed, once its forks are gone, and added again.
#[track_caller]
fn can_be_added_again(fixture: &Fixture) {
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    assert_eq!(fixture.add_template()["state"], "ready");
    fixture.create(&json!({ "id": "again" }));
}

/// What leases are for.
#[test]
fn a_writer_is_held_up_until_no_fork_can_see_what_it_writes() {
    let Some(fixture) = leased() else { return };
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    let complete = fixture.serving("complete", "uffd");
    fixture.ask("POST", "/v1/forks/complete/complete").ok(202);
    fixture.await_fork("complete", "complete");
    let uffd: Vec<_> = ["uffd-1", "uffd-2"].map(|id| fixture.serving(id, "uffd")).into();
    let told = fixture.serving("told", "file");
    // Its pid is in nobody's request, and nobody has asked for it since.
    let placed = SimVmm::spawn().unwrap();
    let created = fixture.create(&json!({ "id": "placed", "path": place }));
    fixture.restore(&placed, &created);
    // Of this one nobody knows that it was started, only that it could be.
    let untold = SimVmm::spawn().unwrap();
    let created = fixture.create(&json!({ "id": "untold", "backend": "file" }));
    fixture.restore(&untold, &created);
    let files = [&told, &placed, &untold];
    let mut reading = Vec::new();
    for (number, vmm) in (0..).zip(uffd.iter().chain(files)) {
        writes(vmm);
        reading.push(reads_on(vmm, number));
    }
    fixture.create(&json!({ "id": "waiting", "backend": "uffd" }));

    ends_well(start_writing(fixture.file.path()));
    // The writer got in, so by now:
    for vmm in files {
        assert!(is_dead(vmm));
    }
    let states = ["uffd-1", "uffd-2"].map(|id| fixture.fork(id)["state"].clone());
    for (vmm, state) in uffd.iter().zip(&states) {
        assert!(state == "complete" || is_dead(vmm), "{state}");
    }
    assert_eq!(first_byte(fixture.file.path()), b'X');
    for id in ["told", "placed", "untold", "waiting"] {
        let fork = fixture.fork(id);
        assert_eq!(
            (&fork["state"], &fork["error"]["code"]),
            (&json!("failed"), &json!("template_changed")),
            "{fork:#}"
        );
    }
    assert!(!place.exists());
    // Those that are complete have it all, and it is what the template was.
    assert_eq!(states, ["complete", "complete"]);
    reads_right(&complete);
    for (vmm, reading) in uffd.iter().zip(reading) {
        assert!(!reading.is_done());
        reads_right(vmm);
    }
    cannot_be_forked(&fixture, "for writing");
    can_be_added_again(&fixture);
}

/// A VMM that was told where its memory is, and is slow to open it, must not get what was written since.
#[test]
fn a_vmm_that_comes_after_the_writer_finds_nothing() {
    let Some(fixture) = leased() else { return };
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    let created = [
        fixture.create(&json!({ "id": "file", "backend": "file" })),
        fixture.create(&json!({ "id": "placed", "path": place })),
    ];
    let socket = fixture.create(&json!({ "id": "uffd", "backend": "uffd" }));
    ends_well(start_writing(fixture.file.path()));
    for created in &created {
        let path = created["mem_backend"]["backend_path"].as_str().unwrap();
        let late = MapFile {
            path: path.into(),
            template: fixture.file.model().clone(),
        };
        let refused = SimVmm::spawn().unwrap().run(late).unwrap_err();
        assert!(refused.to_string().contains("No such file"), "{refused}");
    }
    let socket = Path::new(socket["mem_backend"]["backend_path"].as_str().unwrap());
    eventually("its socket is gone", || !socket.exists());
    can_be_added_again(&fixture);
}

#[test]
fn a_template_that_is_truncated_is_truncated_only_after_its_forks() {
    let Some(fixture) = leased() else { return };
    let uffd = fixture.serving("uffd", "uffd");
    let file = fixture.serving("file", "file");
    let _reading = reads_on(&file, 1);
    let truncate = std::process::Command::new("sh")
        .args(["-c", r#"head -c 4096 /dev/zero >"$0""#])
        .arg(fixture.file.path())
        .spawn();
    ends_well(truncate.unwrap());
    assert!(is_dead(&file));
    assert_eq!(fixture.fork("file")["state"], "failed");
    assert_eq!(fixture.fork("uffd")["state"], "complete");
    reads_right(&uffd);
    cannot_be_forked(&fixture, "for writing");
    can_be_added_again(&fixture);
    assert_eq!(fixture.template()["size_bytes"], 4096);
}

/// One that asks not to wait is refused, and gets in when it asks again.
#[test]
fn a_writer_that_does_not_wait_is_refused_until_the_forks_have_ended() {
    let Some(fixture) = leased() else { return };
    let file = fixture.serving("file", "file");
    let open = || {
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        File::options()
            .write(true)
            .custom_flags(flags)
            .open(fixture.file.path())
    };
    assert_eq!(open().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let until = Instant::now() + PATIENCE;
    while open().is_err() {
        assert!(Instant::now() < until);
    }
    assert!(is_dead(&file));
    cannot_be_forked(&fixture, "for writing");
    can_be_added_again(&fixture);
}

#[test]
fn two_templates_of_one_file_both_lose_their_forks_to_its_writer() {
    let Some(fixture) = leased() else { return };
    fixture
        .send("PUT", "/v1/templates/u", &json!({ "mem_path": fixture.file.path() }))
        .ok(201);
    let vmms: Vec<_> = ["t", "u"]
        .into_iter()
        .map(|template| {
            let vmm = SimVmm::spawn().unwrap();
            let created = fixture.create(&json!({ "template": template, "backend": "file", "pid": vmm.pid() }));
            fixture.restore(&vmm, &created);
            vmm
        })
        .collect();
    ends_well(start_writing(fixture.file.path()));
    for vmm in &vmms {
        assert!(is_dead(vmm));
    }
    cannot_be_forked(&fixture, "for writing");
    assert_eq!(fixture.ask("GET", "/v1/templates/u").ok(200)["state"], "changed");
}

/// Bytes do not change by that, so whoever has them keeps them. Nobody new gets them, since whoever asks for a fork means
/// what is at the path.
fn moved(how: &str, change: impl FnOnce(&Fixture, &Path)) -> Fixture {
    let fixture = Fixture::new();
    fixture.add_template();
    let waiting = fixture.create(&json!({ "id": "waiting", "backend": "uffd" }));
    let vmms = [fixture.serving("uffd", "uffd"), fixture.serving("file", "file")];
    change(&fixture, fixture.file.path());
    cannot_be_forked(&fixture, how);
    for vmm in &vmms {
        reads_right(vmm);
        writes(vmm);
        reads_right(vmm);
    }
    // It was made before.
    let late = SimVmm::spawn().unwrap();
    fixture.restore(&late, &waiting);
    reads_right(&late);
    for id in ["uffd", "file", "waiting"] {
        assert_eq!(fixture.fork(id)["state"], "serving");
    }
    fixture.ask("DELETE", "/v1/templates/t").error(409, "template_in_use");
    for id in ["uffd", "file", "waiting"] {
        fixture.ask("DELETE", &format!("/v1/forks/{id}?kill=true")).ok(204);
    }
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    fixture
}

#[test]
fn a_template_that_is_replaced_is_what_it_was_for_its_forks_and_refused_to_new_ones() {
    let fixture = moved("replaced by another file", |fixture, path| {
        let other = fixture.folder.path().join("other");
        std::fs::write(&other, [7; 8192]).unwrap();
        std::fs::rename(&other, path).unwrap();
    });
    assert_eq!(fixture.add_template()["size_bytes"], 8192);
}

#[test]
fn a_template_that_is_renamed_is_what_it_was_for_its_forks_and_refused_to_new_ones() {
    let fixture = moved("path cannot be checked", |_, path| {
        std::fs::rename(path, path.with_extension("away")).unwrap();
    });
    let add = json!({ "mem_path": fixture.file.path().with_extension("away") });
    fixture.send("PUT", "/v1/templates/t", &add).ok(201);
}

#[test]
fn a_template_that_is_deleted_is_what_it_was_for_its_forks_and_refused_to_new_ones() {
    let fixture = moved("path cannot be checked", |_, path| std::fs::remove_file(path).unwrap());
    let add = json!({ "mem_path": fixture.file.path() });
    fixture
        .send("PUT", "/v1/templates/t", &add)
        .error(422, "template_invalid");
}

/// Without a lease, what is written is noticed once it was: whoever could read it ends.
fn noticed(how: &str, change: impl FnOnce(&File)) {
    let Some(fixture) = watched() else { return };
    let complete = fixture.serving("complete", "uffd");
    fixture.ask("POST", "/v1/forks/complete/complete").ok(202);
    fixture.await_fork("complete", "complete");
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    let vmms = [
        fixture.serving("uffd", "uffd"),
        fixture.serving("file", "file"),
        SimVmm::spawn().unwrap(),
    ];
    let created = fixture.create(&json!({ "id": "placed", "path": place }));
    fixture.restore(&vmms[2], &created);
    fixture.create(&json!({ "id": "waiting", "backend": "uffd" }));
    // Nobody asks for anything, and it is noticed all the same.
    change(&File::options().write(true).open(fixture.file.path()).unwrap());
    for vmm in &vmms {
        eventually("its VMM is dead", || is_dead(vmm));
    }
    for (id, code) in [
        ("uffd", "template_changed"),
        ("file", "template_changed"),
        ("placed", "template_changed"),
        ("waiting", "template_changed"),
    ] {
        let fork = fixture.await_fork(id, "failed");
        assert_eq!(fork["error"]["code"], code, "{fork:#}");
        assert!(fork["error"]["message"].as_str().unwrap().contains(how), "{fork:#}");
    }
    reads_right(&complete);
    cannot_be_forked(&fixture, how);
    can_be_added_again(&fixture);
}

#[test]
fn without_a_lease_a_write_is_noticed_and_forks_fail_closed() {
    noticed("it was written", |file| file.write_all_at(b"X", 0).unwrap());
}

#[test]
fn without_a_lease_a_template_that_grows_is_noticed_and_forks_fail_closed() {
    noticed("bytes, had", |file| file.set_len(16 << 20).unwrap());
}

/// Its `file` VMMs die of it by themselves, or are killed.
#[test]
fn without_a_lease_truncating_is_noticed_and_forks_fail_closed() {
    let Some(fixture) = watched() else { return };
    let vmms = [fixture.serving("uffd", "uffd"), fixture.serving("file", "file")];
    let _reading: Vec<_> = vmms.iter().map(|vmm| reads_on(vmm, 1)).collect();
    File::options()
        .write(true)
        .open(fixture.file.path())
        .unwrap()
        .set_len(4096)
        .unwrap();
    for (vmm, id) in vmms.iter().zip(["uffd", "file"]) {
        eventually("its VMM is dead", || is_dead(vmm));
        eventually("its end is told", || {
            ["failed", "exited"].contains(&fixture.fork(id)["state"].as_str().unwrap())
        });
    }
    cannot_be_forked(&fixture, "4096 bytes");
    can_be_added_again(&fixture);
}

/// A fork that reads while the template is written sees what it was, or nothing any more.
#[test]
fn without_a_lease_a_uffd_fork_never_sees_a_byte_that_was_written() {
    let Some(fixture) = watched() else { return };
    let vmm = fixture.serving("uffd", "uffd");
    let file = File::options().write(true).open(fixture.file.path()).unwrap();
    for page in 0..fixture.file.model().size / 4096 {
        if page == 1000 {
            file.write_all_at(&vec![0xff; 4 << 20], 4 << 20).unwrap();
        }
        let read = pagecast_testkit::sim_vmm::Read {
            pages: pagecast_testkit::sim_vmm::Pages::range(page..page + 1),
            ..Default::default()
        };
        let Ok(report) = vmm.run(read) else {
            assert!(page >= 1000, "{page}");
            break;
        };
        // Right bytes only. Some pages came with others before the file was written.
        assert_eq!((report.checked.mismatches, page < 1024 + 32), (0, true), "{report:?}");
    }
    eventually("its VMM is dead", || is_dead(&vmm));
    let fork = fixture.await_fork("uffd", "failed");
    assert_eq!(fork["error"]["code"], "template_changed", "{fork:#}");
}

#[test]
fn a_template_in_use_is_not_removed_and_one_whose_forks_have_ended_is() {
    let fixture = Fixture::new();
    fixture.add_template();
    let vmm = fixture.serving("f", "file");
    fixture.create(&json!({ "id": "w", "backend": "uffd" }));
    let message = fixture.ask("DELETE", "/v1/templates/t").error(409, "template_in_use");
    assert!(message.contains("f, w"), "{message}");
    vmm.kill().unwrap();
    fixture.await_fork("f", "exited");
    fixture.ask("DELETE", "/v1/forks/w").ok(204);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    // What is known of its forks stays.
    assert_eq!(fixture.fork("f")["template"], "t");
    assert_eq!(fixture.fork("f")["error"], Value::Null);
}
