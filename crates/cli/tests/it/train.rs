//! `pagecast template train` with the real Firecracker: what it learns, and that nothing is left of it however it ends.

use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;

use crate::command::text;
use crate::daemon::signal;
use crate::host::Host;

#[test]
fn what_a_guest_touches_first_is_learned_kept_and_added_to() {
    let Some(host) = Host::new() else { return };
    let train = host.train(&["--json"]).output().unwrap();
    assert!(train.status.success(), "{train:?}");
    assert_eq!(text(&train.stderr), "");
    let trained: Value = serde_json::from_slice(&train.stdout).unwrap();
    let recorded = trained["recorded_bytes"].as_u64().unwrap();
    assert!(
        recorded >= 4096 && trained["faults"].as_u64().unwrap() > 0,
        "{trained:#}"
    );
    let set = &trained["working_set"];
    assert_eq!((&set["size_bytes"], &set["recordings"]), (&recorded.into(), &1.into()));
    host.assert_nothing_is_left();
    let kept = host.template.path().read_dir().unwrap();
    let kept = kept.filter(|entry| {
        entry
            .as_ref()
            .unwrap()
            .path()
            .extension()
            .is_some_and(|end| end == "working-set")
    });
    assert_eq!(kept.count(), 1);

    let train = host.train(&[]).output().unwrap();
    let said = text(&train.stdout);
    let heads: Vec<_> = said.lines().map(|line| line.split("  ").next().unwrap()).collect();
    assert_eq!(heads, ["template", "recorded", "working set"], "{said}");
    assert!(said.contains(" from 2 recordings"), "{said}");
    host.assert_nothing_is_left();

    // Forks get it ahead, by default.
    let run = host.output(&["-n", "2", "--backend", "uffd", "--json"]);
    assert!(run.status.success(), "{run:?}");
    let run = host.output(&["-n", "1", "--backend", "uffd", "--prefault", "none", "--json"]);
    assert!(run.status.success(), "{run:?}");
}

#[test]
fn a_signal_leaves_nothing_and_nothing_is_learned() {
    let Some(host) = Host::new() else { return };
    let vmstate = host.endless_vmstate();
    let mut train = host.train(&["--vmstate", &vmstate]);
    let train = train.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    host.await_loading(1);
    signal(&train, Signal::TERM);
    let train = train.wait_with_output().unwrap();
    assert_eq!(train.status.code(), Some(128 + 15), "{train:?}");
    host.assert_nothing_is_left();
    assert_eq!(
        host.daemon.json(&["template", "show", "base"])["working_set"],
        Value::Null
    );
}

#[test]
fn what_cannot_be_is_said_before_anything_is_started() {
    let Some(host) = Host::new() else { return };
    let train = host.train(&["--firecracker", "/nonexistent"]).output().unwrap();
    assert_eq!(train.status.code(), Some(1));
    let dead = host.firecracker_after("exit 3");
    let train = host.train(&["--firecracker", &dead]).output().unwrap();
    assert_eq!(train.status.code(), Some(1), "{train:?}");
    assert!(text(&train.stderr).contains("has ended"), "{train:?}");
    host.assert_nothing_is_left();
}
