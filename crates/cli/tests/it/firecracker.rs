//! Real Firecracker microVMs, restored from one snapshot through `pagecast handle`. Skipped where there is no KVM.

use std::ops::Range;
use std::path::Path;

use pagecast_testkit::firecracker::{GuestRange, MemBackend, MicroVm, Snapshot, SnapshotOptions, kvm};
use pagecast_testkit::hugepages::HugePages;
use rustix::process::Signal;

use crate::command::Handle;

const FORKS: u8 = 20;
const FORKS_WITH_BALLOON: u8 = 4;

fn restore_all(snapshot: &Snapshot, handle: &Handle, count: u8) -> Vec<MicroVm> {
    let backend = MemBackend::Uffd(handle.socket.clone());
    std::thread::scope(|scope| {
        let restores: Vec<_> = (0..count)
            .map(|_| scope.spawn(|| MicroVm::restore(snapshot, &backend).unwrap().0))
            .collect();
        restores.into_iter().map(|restore| restore.join().unwrap()).collect()
    })
}

fn verify(fork: &mut MicroVm, range: GuestRange) {
    let verified = fork.verify(range).unwrap();
    assert_eq!(verified.mismatches, 0, "{verified:?}");
}

/// Has all guests check all their memory at once.
fn verify_all(forks: &mut [MicroVm], snapshot: &Snapshot) {
    std::thread::scope(|scope| {
        for fork in forks {
            scope.spawn(|| verify(fork, snapshot.whole));
        }
    });
}

/// A part of the memory under test.
fn mib(start_mib: u32, count_mib: u32) -> GuestRange {
    GuestRange { start_mib, count_mib }
}

fn snapshot_with_balloon(folder: &Path) -> Snapshot {
    let options = SnapshotOptions {
        balloon: true,
        ..SnapshotOptions::default()
    };
    let snapshot = Snapshot::create(&options, folder).unwrap();
    assert_eq!(snapshot.filled, mib(2, 64), "the ranges below are parts of it");
    snapshot
}

#[test]
fn twenty_real_forks_read_write_and_outlive_the_server() {
    if kvm().unwrap().skips() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
    let mut handle = Handle::start(folder.path(), &snapshot.mem_path);
    let mut forks = restore_all(&snapshot, &handle, FORKS);
    handle.await_events("serving", FORKS.into());

    verify_all(&mut forks, &snapshot);
    // Each its own pattern, so that a write that shows in another fork is noticed.
    for (number, fork) in (2..).zip(&mut forks) {
        fork.write(snapshot.whole, 8, number).unwrap();
    }
    verify_all(&mut forks, &snapshot);

    handle.signal(Signal::TERM);
    let ended = handle.await_events("ended", FORKS.into());
    assert!(ended.iter().all(|end| end["state"] == "complete"), "{ended:#?}");
    assert!(handle.wait().success());
    // Nobody serves them any more.
    verify_all(&mut forks, &snapshot);
}

#[test]
fn a_real_fork_that_has_read_nothing_is_completed_when_the_server_stops() {
    if kvm().unwrap().skips() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
    let mut handle = Handle::start(folder.path(), &snapshot.mem_path);
    let mut forks = restore_all(&snapshot, &handle, 2);
    handle.await_events("serving", 2);
    let (resting, reading) = forks.split_at_mut(1);
    std::thread::scope(|scope| {
        scope.spawn(|| verify_all(reading, &snapshot));
        handle.signal(Signal::TERM);
        let ended = handle.await_events("ended", 2);
        assert!(ended.iter().all(|end| end["state"] == "complete"), "{ended:#?}");
        assert!(handle.wait().success());
    });
    verify_all(resting, &snapshot);
    verify_all(&mut forks, &snapshot);
}

#[test]
fn a_real_fork_killed_in_the_middle_of_reading_costs_only_itself() {
    if kvm().unwrap().skips() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path()).unwrap();
    let mut handle = Handle::start(folder.path(), &snapshot.mem_path);
    let mut forks = restore_all(&snapshot, &handle, 3);
    handle.await_events("serving", 3);
    let mut victim = forks.remove(0);
    let pid = victim.pid();
    victim.start_verify(snapshot.whole).unwrap();
    victim.kill().unwrap();
    let ended = handle.await_event("ended");
    assert_eq!(
        (&ended["state"], &ended["pid"]),
        (&"exited".into(), &pid.into()),
        "{ended:#?}"
    );
    verify_all(&mut forks, &snapshot);
}

#[test]
fn memory_that_a_real_guest_gives_back_is_zeros_from_then_on() {
    if kvm().unwrap().skips() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = snapshot_with_balloon(folder.path());
    let mut handle = Handle::start(folder.path(), &snapshot.mem_path);
    let mut forks = restore_all(&snapshot, &handle, FORKS_WITH_BALLOON);
    handle.await_events("serving", forks.len());

    // Each fork for itself, so that some give memory back while others read.
    std::thread::scope(|scope| {
        for (number, fork) in (2..).zip(&mut forks) {
            let snapshot = &snapshot;
            scope.spawn(move || {
                // Half of what is filled: 16 MiB that were read, and 16 MiB that were never there.
                verify(fork, mib(2, 32));
                let given = fork.inflate(mib(18, 32)).unwrap();
                assert_eq!(given.pages, 32 * 256, "{given:?}");
                verify(fork, mib(18, 32));
                // What was read before, and what comes from the template only now.
                verify(fork, snapshot.whole);

                // Some of it is written again, and some of that given back again.
                fork.write(mib(10, 32), 3, number).unwrap();
                verify(fork, snapshot.whole);
                fork.inflate(mib(14, 16)).unwrap();
                verify(fork, snapshot.whole);
            });
        }
    });

    handle.signal(Signal::TERM);
    let ended = handle.await_events("ended", forks.len());
    for end in &ended {
        assert_eq!(end["state"], "complete", "{end:#?}");
        assert_eq!(end["faults"]["removed"], (32 + 16) * 256, "{end:#?}");
    }
    assert!(handle.wait().success());
    verify_all(&mut forks, &snapshot);
    // With nobody to hear of it.
    for fork in &mut forks {
        fork.inflate(mib(2, 32)).unwrap();
    }
    verify_all(&mut forks, &snapshot);
}

#[test]
fn real_forks_that_give_memory_back_while_the_server_stops_are_completed_right() {
    if kvm().unwrap().skips() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let snapshot = snapshot_with_balloon(folder.path());
    let mut handle = Handle::start(folder.path(), &snapshot.mem_path);
    let mut forks = restore_all(&snapshot, &handle, FORKS_WITH_BALLOON);
    handle.await_events("serving", forks.len());

    // Every other MiB; all but the first few absent.
    let give_back = |fork: &mut MicroVm, range: Range<u32>| {
        for start in range.step_by(2) {
            fork.inflate(mib(start, 1)).unwrap();
            verify(fork, mib(start, 1));
        }
    };
    std::thread::scope(|scope| {
        for fork in &mut forks {
            scope.spawn(move || {
                verify(fork, mib(2, 8));
                give_back(fork, 2..34);
            });
        }
    });
    let ended = std::thread::scope(|scope| {
        for fork in &mut forks {
            scope.spawn(move || give_back(fork, 34..66));
        }
        handle.signal(Signal::TERM);
        handle.await_events("ended", FORKS_WITH_BALLOON.into())
    });
    for end in &ended {
        assert_eq!(end["state"], "complete", "{end:#?}");
        // Those before the signal for sure, those after it as far as the fork was not complete yet.
        let removed = end["faults"]["removed"].as_u64().unwrap();
        assert!((16 * 256..=32 * 256).contains(&removed), "{end:#?}");
    }
    assert!(handle.wait().success());
    verify_all(&mut forks, &snapshot);
}

#[test]
fn real_forks_of_two_mebibyte_pages_read_and_write() {
    if kvm().unwrap().skips() {
        return;
    }
    let options = SnapshotOptions {
        huge_pages: true,
        ..SnapshotOptions::default()
    };
    // For the guest that is snapshotted, whose pages the kernel may give back some time after its end, and for two forks.
    let Some(_pages) = HugePages::reserve(u64::from(options.mem_mib) / 2 * 3).unwrap() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::create(&options, folder.path()).unwrap();
    let mut handle = Handle::start(folder.path(), &snapshot.mem_path);
    let mut forks = restore_all(&snapshot, &handle, 2);
    handle.await_events("serving", 2);
    verify_all(&mut forks, &snapshot);
    for (number, fork) in (2..).zip(&mut forks) {
        fork.write(snapshot.whole, 8, number).unwrap();
    }
    verify_all(&mut forks, &snapshot);
    handle.signal(Signal::TERM);
    let ended = handle.await_events("ended", 2);
    assert!(ended.iter().all(|end| end["state"] == "complete"), "{ended:#?}");
    assert!(handle.wait().success());
    verify_all(&mut forks, &snapshot);
}
