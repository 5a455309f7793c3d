//! Templates brought into memory ahead of their forks, and kept there.

use std::os::unix::fs::FileExt;

use pagecast_testkit::skip::{Need, skip};
use procfs::Current;
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;
use serde_json::{Value, json};

use crate::fixture::{Fixture, SIZE, ends_well, eventually, reads_right, start_writing, writes};

const WARM: &str = "/v1/templates/t/warm";
const HUGE: u64 = 2 << 20;

/// Waits until it is no longer on its way.
#[track_caller]
fn warmed(fixture: &Fixture) -> Value {
    let mut warmth = Value::Null;
    eventually("the template is in memory", || {
        warmth = fixture.template()["warmth"].clone();
        warmth["state"] != "warming"
    });
    warmth
}

/// How much this process, which the daemon is in, has locked in memory, in bytes.
fn locked() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn keep(fixture: &Fixture) -> Value {
    fixture.send("POST", WARM, &json!({ "resident": true })).ok(202);
    let warmth = warmed(fixture);
    assert_eq!(warmth["state"], "warm", "{warmth:#}");
    warmth
}

#[test]
fn a_template_is_brought_into_memory_and_its_forks_are_told() {
    let fixture = Fixture::new();
    fixture.send("POST", WARM, &json!({})).error(404, "template_not_found");
    assert_eq!(fixture.add_template()["warmth"], Value::Null);
    fixture
        .send("POST", WARM, &json!({ "hot": true }))
        .error(422, "invalid_field");
    let begun = fixture.send("POST", WARM, &json!({})).ok(202)["warmth"].clone();
    assert_eq!(begun["resident"], false, "{begun:#}");
    let warmth = warmed(&fixture);
    assert_eq!(
        (&warmth["state"], &warmth["resident"], &warmth["error"]),
        (&json!("warm"), &json!(false), &Value::Null)
    );
    // No block of 2 MiB of it is all zeros.
    assert_eq!(
        (&warmth["wanted_bytes"], &warmth["read_bytes"], &warmth["locked_bytes"]),
        (&json!(SIZE), &json!(SIZE), &json!(0))
    );
    let huge = warmth["huge_bytes"].as_u64().unwrap();
    assert!(huge.is_multiple_of(HUGE) && huge <= SIZE, "{warmth:#}");

    let reason = fixture.create(&json!({ "id": "file", "backend": "auto" }))["reason"].clone();
    let said = format!("{SIZE} bytes of it were brought into memory ahead, {huge} of them");
    assert!(reason.as_str().unwrap().contains(&said), "{reason}");
    let vmm = fixture.serving("vmm", "file");
    reads_right(&vmm);
    writes(&vmm);
    reads_right(&vmm);

    // Once more is fine, and so is taking it back.
    fixture.send("POST", WARM, &json!({})).ok(202);
    fixture.ask("DELETE", WARM).ok(204);
    fixture.ask("DELETE", WARM).ok(204);
    assert_eq!(fixture.template()["warmth"], Value::Null);
}

#[test]
fn a_resident_template_is_locked_until_it_is_taken_back_or_removed() {
    let fixture = Fixture::new();
    fixture.add_template();
    let before = locked();
    let warmth = keep(&fixture);
    assert_eq!(
        (&warmth["resident"], &warmth["locked_bytes"]),
        (&json!(true), &json!(SIZE))
    );
    assert_eq!(locked(), before + SIZE);
    let metrics = String::from_utf8(fixture.ask("GET", "/metrics").body).unwrap();
    let line = format!("pagecast_template_locked_bytes{{template=\"t\"}} {SIZE}\n");
    assert!(metrics.contains(&line), "{metrics}");
    let vmm = fixture.serving("vmm", "file");
    reads_right(&vmm);
    vmm.exit(0).unwrap();
    fixture.await_fork("vmm", "exited");

    // What was asked for last holds.
    fixture.send("POST", WARM, &json!({ "resident": false })).ok(202);
    assert_eq!((warmed(&fixture)["locked_bytes"].clone(), locked()), (json!(0), before));
    keep(&fixture);
    fixture.ask("DELETE", WARM).ok(204);
    assert_eq!(locked(), before);
    keep(&fixture);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    assert_eq!(locked(), before);
    assert_eq!(fixture.kept("templates"), [""; 0]);
}

#[test]
fn the_next_daemon_keeps_a_resident_template_in_memory_again() {
    let mut fixture = Fixture::new();
    fixture.add_template();
    keep(&fixture);
    fixture.restart();
    let warmth = warmed(&fixture);
    assert_eq!(
        (&warmth["state"], &warmth["resident"], &warmth["locked_bytes"]),
        (&json!("warm"), &json!(true), &json!(SIZE))
    );
    fixture.ask("DELETE", WARM).ok(204);
    fixture.restart();
    assert_eq!(fixture.template()["warmth"], Value::Null);
    assert_eq!(locked(), 0);
}

#[test]
fn a_writer_is_let_on_and_nothing_of_the_template_stays() {
    let fixture = Fixture::new();
    if fixture.add_template()["guard"] != "lease" {
        return skip(Need::Leases);
    }
    keep(&fixture);
    ends_well(start_writing(fixture.file.path()));
    let template = fixture.template();
    assert_eq!(
        (&template["state"], &template["warmth"]),
        (&json!("changed"), &Value::Null)
    );
    assert_eq!(locked(), 0);
    fixture.send("POST", WARM, &json!({})).error(409, "template_changed");
    // A daemon that is started now does not keep it either.
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
}

#[test]
fn a_template_that_memory_cannot_hold_is_refused_and_can_be_forked_all_the_same() {
    let memory = procfs::Meminfo::current().unwrap().mem_total;
    if memory > 256 << 30 {
        return skip("at most 256 GiB of memory: a template of more takes too long to write");
    }
    // One byte in each 2 MiB, which are wanted as a whole. It takes 4 KiB of each.
    let size = (memory + memory / 4).next_multiple_of(HUGE);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.mem");
    let file = std::fs::File::create(&path).unwrap();
    for at in (0..size).step_by(usize::try_from(HUGE).unwrap()) {
        file.write_all_at(b"x", at).unwrap();
    }
    file.set_len(size).unwrap();
    // Nobody may have it open for writing.
    drop(file);
    let fixture = Fixture::new();
    fixture
        .send("PUT", "/v1/templates/big", &json!({ "mem_path": path }))
        .ok(201);
    for resident in [false, true] {
        let refused = fixture.send("POST", "/v1/templates/big/warm", &json!({ "resident": resident }));
        refused.error(503, "not_enough_memory");
    }
    let big = fixture.ask("GET", "/v1/templates/big").ok(200);
    assert_eq!((&big["state"], &big["warmth"]), (&json!("ready"), &Value::Null));
    let fork = json!({ "id": "fork", "template": "big", "backend": "file" });
    fixture.send("POST", "/v1/forks", &fork).ok(201);
}

#[test]
fn who_may_not_lock_memory_is_told_what_it_takes() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    rustix::thread::set_capabilities(None, sets).unwrap();
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Memlock, none).unwrap();
    // Its threads can do no more than the one that starts them.
    let fixture = Fixture::new();
    fixture.add_template();
    fixture.send("POST", WARM, &json!({ "resident": true })).ok(202);
    let warmth = warmed(&fixture);
    assert_eq!(
        (&warmth["state"], &warmth["locked_bytes"]),
        (&json!("failed"), &json!(0))
    );
    assert!(warmth["error"].as_str().unwrap().contains("CAP_IPC_LOCK"), "{warmth:#}");
    // It is as usable as it was.
    reads_right(&fixture.serving("vmm", "file"));
}
