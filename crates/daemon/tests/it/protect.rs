//! Templates that are protected while they are templates.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pagecast_client::template::Protection;
use pagecast_testkit::sim_vmm::SimVmm;
use pagecast_testkit::skip::skip;
use rustix::fs::IFlags;
use serde_json::json;

use crate::fixture::{Fixture, reads_right};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn is_immutable(path: &Path) -> bool {
    rustix::fs::ioctl_getflags(File::open(path).unwrap()).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE))
}

/// Takes the flag away where a test has failed, so that the file can be deleted.
struct Mutable(PathBuf);

impl Drop for Mutable {
    fn drop(&mut self) {
        if let Ok(file) = File::open(&self.0)
            && let Ok(flags) = rustix::fs::ioctl_getflags(&file)
        {
            let _ = rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE);
        }
    }
}

/// Adds the template as `t`, immutable. Says that the test is skipped where that cannot be.
fn add_immutable(fixture: &Fixture) -> Option<Mutable> {
    let add = json!({ "mem_path": fixture.file.path(), "protect": "immutable" });
    let mutable = Mutable(fixture.file.path().to_owned());
    let answer = fixture.send("PUT", "/v1/templates/t", &add);
    if answer.status == 422 {
        skip(&answer.error(422, "template_invalid"));
        assert_eq!(fixture.kept("templates"), [""; 0]);
        return None;
    }
    assert_eq!(answer.ok(201)["protect"], "immutable");
    Some(mutable)
}

#[test]
fn a_readonly_template_gets_its_mode_back_when_it_is_removed() {
    let mut fixture = Fixture::new();
    let path = fixture.file.path().to_owned();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let add = json!({ "mem_path": path, "protect": "readonly" });
    assert_eq!(
        fixture.send("PUT", "/v1/templates/t", &add).ok(201)["protect"],
        "readonly"
    );
    assert_eq!(mode(&path), 0o440);
    fixture.send("PUT", "/v1/templates/t", &add).ok(200);
    // Asked for differently, it is another.
    fixture
        .send("PUT", "/v1/templates/t", &json!({ "mem_path": path }))
        .error(409, "template_exists");
    reads_right(&fixture.serving("f", "file"));
    fixture.restart();
    assert_eq!(mode(&path), 0o440);
    assert_eq!(fixture.template()["protect"], "readonly");
    fixture.ask("DELETE", "/v1/forks/f?kill=true");
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    assert_eq!(mode(&path), 0o640);
    fixture.file.check_untouched().unwrap();
}

#[test]
fn an_immutable_template_can_be_neither_written_nor_moved_until_it_is_removed() {
    let mut fixture = Fixture::new();
    let Some(_mutable) = add_immutable(&fixture) else {
        return;
    };
    let path = fixture.file.path().to_owned();
    for _ in 0..2 {
        assert!(is_immutable(&path));
        assert!(File::options().write(true).open(&path).is_err());
        assert!(std::fs::rename(&path, path.with_extension("away")).is_err());
        assert!(std::fs::remove_file(&path).is_err());
        fixture.restart();
    }
    // Neither has any of this cost it anything.
    assert_eq!(fixture.template()["state"], "ready");
    for backend in ["uffd", "file"] {
        reads_right(&fixture.serving(backend, backend));
    }
    for backend in ["uffd", "file"] {
        fixture.ask("DELETE", &format!("/v1/forks/{backend}?kill=true")).ok(204);
    }
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    assert!(!is_immutable(&path));
    assert_eq!(fixture.kept("templates"), [""; 0]);
    fixture.file.check_untouched().unwrap();
}

/// Whichever is removed last gives back what was before the first.
#[test]
fn a_file_of_two_templates_stays_protected_until_both_are_removed() {
    for order in [["t", "u"], ["u", "t"]] {
        let mut fixture = Fixture::new();
        let path = fixture.file.path().to_owned();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let add = |fixture: &Fixture, name: &str, how: &str| {
            let body = json!({ "mem_path": path, "protect": how });
            fixture.send("PUT", &format!("/v1/templates/{name}"), &body)
        };
        add(&fixture, "t", "readonly").ok(201);
        add(&fixture, "u", "readonly").ok(201);
        add(&fixture, "v", "none").ok(201);
        let refused = add(&fixture, "w", "immutable").error(422, "template_invalid");
        assert!(refused.contains("template t"), "{refused}");
        fixture.restart();
        fixture.ask("DELETE", &format!("/v1/templates/{}", order[0])).ok(204);
        assert_eq!(mode(&path), 0o440, "{order:?}");
        fixture.restart();
        fixture.ask("DELETE", &format!("/v1/templates/{}", order[1])).ok(204);
        assert_eq!(mode(&path), 0o640, "{order:?}");
    }
}

#[test]
fn a_file_of_two_immutable_templates_stays_so_until_both_are_removed() {
    for order in [["t", "u"], ["u", "t"]] {
        let fixture = Fixture::new();
        let Some(_mutable) = add_immutable(&fixture) else {
            return;
        };
        let path = fixture.file.path().to_owned();
        let again = json!({ "mem_path": path, "protect": "immutable" });
        fixture.send("PUT", "/v1/templates/u", &again).ok(201);
        fixture.ask("DELETE", &format!("/v1/templates/{}", order[0])).ok(204);
        assert!(is_immutable(&path), "{order:?}");
        // The link too, that the flag held.
        let kept = fixture.kept("templates");
        assert!(!kept.contains(&format!("{}.mem", order[0])), "{kept:?}");
        fixture.ask("DELETE", &format!("/v1/templates/{}", order[1])).ok(204);
        assert!(!is_immutable(&path), "{order:?}");
        assert_eq!(fixture.kept("templates"), [""; 0]);
    }
}

/// A file with the flag can have no more links.
#[test]
fn an_immutable_template_is_mounted_where_it_cannot_be_linked() {
    let fixture = Fixture::new();
    let Some(_mutable) = add_immutable(&fixture) else {
        return;
    };
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    let answer = fixture.try_create(&json!({ "id": "f", "path": place }));
    if answer.status == 422 {
        return skip(&answer.error(422, "path_invalid"));
    }
    let vmm = SimVmm::spawn().unwrap();
    fixture.restore(&vmm, &answer.ok(201));
    reads_right(&vmm);
    assert_eq!(fixture.await_fork("f", "serving")["pid"], vmm.pid());
    fixture.ask("DELETE", "/v1/forks/f?kill=true").ok(204);
    assert!(!place.exists());
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
}

#[test]
fn the_configuration_says_how_templates_are_protected_that_do_not() {
    let fixture = Fixture::with(|_, settings| settings.protect = Some(Protection::Readonly));
    assert_eq!(fixture.add_template()["protect"], "readonly");
    assert_eq!(mode(fixture.file.path()) & 0o222, 0);
    let other = fixture.folder.path().join("other");
    std::fs::write(&other, [1; 4096]).unwrap();
    let add = json!({ "mem_path": other, "protect": "none" });
    assert_eq!(fixture.send("PUT", "/v1/templates/u", &add).ok(201)["protect"], "none");
    assert_eq!(mode(&other) & 0o200, 0o200);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
}

/// As after a restart of the host whose run dir was on tmpfs.
#[test]
fn a_file_whose_protection_was_forgotten_with_the_run_dir_gets_it_undone_by_the_next_template() {
    for protect in ["readonly", "immutable"] {
        for next in ["none", protect] {
            let mut fixture = Fixture::new();
            let path = fixture.file.path().to_owned();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
            let _mutable = Mutable(path.clone());
            let add = json!({ "mem_path": path, "protect": protect });
            let answer = fixture.send("PUT", "/v1/templates/t", &add);
            if answer.status == 422 {
                skip(&answer.error(422, "template_invalid"));
                continue;
            }
            answer.ok(201);
            let other = fixture.folder.path().join("other run dir");
            fixture.restart_with(|settings| settings.run_dir = Some(other));
            assert!(is_immutable(&path) || mode(&path) == 0o440);

            let again = json!({ "mem_path": path, "protect": next });
            fixture.send("PUT", "/v1/templates/t", &again).ok(201);
            fixture.ask("DELETE", "/v1/templates/t").ok(204);
            assert!(!is_immutable(&path), "{protect} {next}");
            assert_eq!(mode(&path), 0o640, "{protect} {next}");
            // Nothing is left to be undone again.
            fixture.send("PUT", "/v1/templates/t", &again).ok(201);
            fixture.ask("DELETE", "/v1/templates/t").ok(204);
            assert_eq!((is_immutable(&path), mode(&path)), (false, 0o640));
        }
    }
}

#[test]
fn a_file_that_somebody_else_has_made_immutable_stays_so() {
    let fixture = Fixture::new();
    let Some(_mutable) = add_immutable(&fixture) else {
        return;
    };
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    let path = fixture.file.path();
    let file = File::open(path).unwrap();
    let flags = rustix::fs::ioctl_getflags(&file).unwrap();
    rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE).unwrap();
    for protect in ["none", "immutable"] {
        let add = json!({ "mem_path": path, "protect": protect });
        fixture.send("PUT", "/v1/templates/t", &add).ok(201);
        fixture.ask("DELETE", "/v1/templates/t").ok(204);
        assert!(is_immutable(path), "{protect}");
    }
}
