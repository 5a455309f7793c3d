//! What the daemon learns of a template, keeps beside its memory file, and does without.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use pagecast_testkit::sim_vmm::{Pages, Read, SimVmm};
use pagecast_testkit::skip::{Need, skip};
use serde_json::{Value, json};

use crate::fixture::{Fixture, SIZE, eventually, reads_right};

/// How many pages the recorded fork touches.
const TOUCHED: u64 = 600;

fn beside(fixture: &Fixture, suffix: &str) -> PathBuf {
    let mut path = fixture.file.path().as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// A fork whose first faults are recorded, and have been learned from.
#[track_caller]
fn record(fixture: &Fixture, id: &str) -> SimVmm {
    let vmm = SimVmm::spawn().unwrap();
    let created = fixture.create(&json!({ "id": id, "record": true }));
    assert_eq!(created["backend"], "uffd", "whatever shares more: {created:#}");
    fixture.restore(&vmm, &created);
    assert_eq!(
        fixture.fork(id)["recording"],
        json!({ "learned": false, "size_bytes": 0 })
    );
    let read = Read {
        pages: Pages::range(0..TOUCHED),
        ..Read::default()
    };
    assert_eq!(vmm.run(read).unwrap().checked.mismatches, 0);
    eventually("the recording ends by itself", || {
        fixture.fork(id)["recording"]["learned"] == true
    });
    vmm
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value:#}"))
}

#[test]
fn a_recorded_fork_that_is_killed_at_once_teaches_nothing() {
    let fixture = Fixture::new();
    fixture.add_template();
    let _first = record(&fixture, "first");
    let vmm = SimVmm::spawn().unwrap();
    let created = fixture.create(&json!({ "id": "killed", "record": true }));
    fixture.restore(&vmm, &created);
    let read = Read {
        pages: Pages::range(0..TOUCHED / 10),
        ..Read::default()
    };
    vmm.run(read).unwrap();
    vmm.kill().unwrap();
    fixture.await_fork("killed", "exited");
    // Recordings are learned from one after the other.
    let _last = record(&fixture, "last");
    assert_eq!(fixture.template()["working_set"]["recordings"], 2);
    assert_eq!(fixture.fork("killed")["recording"]["learned"], false);
}

#[test]
fn what_a_recorded_fork_touches_first_is_given_to_the_next_ahead() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.add_template()["working_set"], Value::Null);
    let recorded = record(&fixture, "recorded");
    let fork = fixture.fork("recorded");
    assert_eq!(fork["prefault"]["what"], "none");
    let size = number(&fork["recording"]["size_bytes"]);
    assert!((1..=TOUCHED * 4096).contains(&size), "{fork:#}");
    let set = fixture.template()["working_set"].clone();
    assert_eq!((number(&set["size_bytes"]), number(&set["recordings"])), (size, 1));
    assert!(beside(&fixture, ".working-set").exists());

    let vmm = fixture.serving("next", "uffd");
    eventually("it is installed before anybody asks", || {
        // All but what is held out.
        number(&fixture.fork("next")["faults"]["prefaulted"]) * 4096 > size * 9 / 10
    });
    let fork = fixture.fork("next");
    assert_eq!(
        (&fork["prefault"]["what"], &fork["recording"]),
        (&json!("working-set"), &Value::Null)
    );
    reads_right(&vmm);
    reads_right(&recorded);
    for (id, vmm) in [("next", vmm), ("recorded", recorded)] {
        vmm.kill().unwrap();
        fixture.await_fork(id, "exited");
    }

    fixture.restart();
    let found = &fixture.template()["working_set"];
    assert_eq!(
        (&found["size_bytes"], &found["recordings"]),
        (&set["size_bytes"], &set["recordings"])
    );
    fixture.file.check_untouched().unwrap();
}

#[test]
fn each_fork_says_what_it_is_given_ahead() {
    let fixture = Fixture::new();
    fixture.add_template();
    record(&fixture, "recorded");
    let before = number(&fixture.template()["working_set"]["size_bytes"]);
    for (prefault, backend) in [("none", "uffd"), ("all", "auto")] {
        let vmm = SimVmm::spawn().unwrap();
        let created = fixture.create(&json!({ "id": prefault, "backend": backend, "prefault": prefault }));
        assert_eq!(created["backend"], "uffd");
        fixture.restore(&vmm, &created);
        eventually("it is served", || fixture.fork(prefault)["state"] == "serving");
        if prefault == "all" {
            let all = |fork: &Value| number(&fork["installed_bytes"]) + number(&fork["given_back_bytes"]);
            eventually("all but the zeros is installed", || {
                all(&fixture.fork("all")) > SIZE * 8 / 10
            });
        }
        let fork = fixture.fork(prefault);
        assert_eq!(fork["prefault"]["what"], prefault);
        assert_eq!(fork["faults"]["prefaulted"] == 0, prefault == "none", "{fork:#}");
        assert_eq!(fork["state"], "serving", "it still needs the daemon");
        reads_right(&vmm);
    }
    assert_eq!(number(&fixture.template()["working_set"]["size_bytes"]), before);
}

#[test]
fn a_working_set_that_is_not_sound_is_no_working_set_and_no_error() {
    let fixture = Fixture::new();
    std::fs::write(beside(&fixture, ".working-set"), b"pagecast, or so it says").unwrap();
    std::fs::write(beside(&fixture, ".zeros"), [0xff; 400]).unwrap();
    assert_eq!(fixture.add_template()["working_set"], Value::Null);
    let vmm = fixture.serving("f", "uffd");
    reads_right(&vmm);
    // It is learned anew, in its place.
    record(&fixture, "recorded");
    assert_eq!(fixture.template()["working_set"]["recordings"], 1);
}

/// A daemon that was killed, with its run dir deleted, leaves the same: the link that it had made is gone.
#[test]
fn a_working_set_outlives_links_and_permissions_of_the_memory_file_that_others_change() {
    let mut fixture = Fixture::new();
    fixture.add_template();
    drop(record(&fixture, "recorded"));
    fixture.await_fork("recorded", "exited");
    let learned = fixture.template()["working_set"].clone();
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    let path = fixture.file.path().to_owned();
    fixture.restart_with(|_| {
        let link = path.with_extension("link");
        std::fs::hard_link(&path, &link).unwrap();
        std::fs::remove_file(&link).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    });
    assert_eq!(
        fixture.add_template()["working_set"]["size_bytes"],
        learned["size_bytes"]
    );
}

#[test]
fn a_working_set_of_another_memory_file_is_not_used() {
    let mut fixture = Fixture::new();
    fixture.add_template();
    drop(record(&fixture, "recorded"));
    fixture.await_fork("recorded", "exited");
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    // The same bytes, written again.
    let copy = fixture.folder.path().join("copy");
    std::fs::copy(fixture.file.path(), &copy).unwrap();
    std::fs::rename(&copy, fixture.file.path()).unwrap();
    assert_eq!(fixture.add_template()["working_set"], Value::Null);
    fixture.restart();
    assert_eq!(fixture.template()["working_set"], Value::Null);
}

#[test]
fn what_cannot_be_kept_is_known_until_the_daemon_stops() {
    let mut fixture = Fixture::new();
    // Root may write anywhere, but not a file where there is a folder.
    std::fs::create_dir(beside(&fixture, ".working-set")).unwrap();
    fixture.add_template();
    drop(record(&fixture, "recorded"));
    assert_eq!(fixture.template()["working_set"]["recordings"], 1);
    fixture.await_fork("recorded", "exited");
    fixture.restart();
    assert_eq!(fixture.template()["working_set"], Value::Null);
}

#[test]
fn zeros_are_looked_for_once_and_again_only_where_that_is_lost() {
    let mut fixture = Fixture::new();
    fixture.age();
    if fixture.add_template()["guard"] != "lease" {
        return skip(Need::Leases);
    }
    let zeros = beside(&fixture, ".zeros");
    eventually("the zeros are kept", || zeros.exists());
    let kept = std::fs::read(&zeros).unwrap();
    let known = fixture.template()["zero_bytes"].clone();
    assert!(number(&known) > SIZE / 7, "{known}");
    fixture.restart();
    assert_eq!(fixture.template()["zero_bytes"], known, "at once");

    // A map that says of every page that it is zeros, but for its checksum.
    let mut wrong = kept.clone();
    let body = wrong.len() - 32 - usize::try_from(SIZE / 4096 / 8).unwrap();
    wrong[body..].fill(0xff);
    std::fs::write(&zeros, wrong).unwrap();
    fixture.restart();
    reads_right(&fixture.serving("f", "uffd"));
    eventually("they are kept again", || {
        std::fs::read(&zeros).is_ok_and(|bytes| bytes == kept)
    });
}

#[test]
fn a_fork_without_faults_is_completed_where_that_is_wanted() {
    let after = Duration::from_millis(200);
    let fixture = Fixture::with(|_, settings| settings.complete_idle_after = Some(after));
    fixture.add_template();
    // Nothing to look at for a while; then one, and later another.
    for id in ["one", "other"] {
        let vmm = fixture.serving(id, "uffd");
        fixture.await_fork(id, "complete");
        reads_right(&vmm);
    }
}
