//! Real Firecracker microVMs, restored from one snapshot through `pagecast handle`. Skipped where there is no KVM.

use pagecast_testkit::firecracker::{MemBackend, MicroVm, Snapshot, SnapshotOptions, kvm};
use pagecast_testkit::hugepages::HugePages;
use rustix::process::Signal;

use crate::command::Handle;

const FORKS: u8 = 20;

fn restore_all(snapshot: &Snapshot, handle: &Handle, count: u8) -> Vec<MicroVm> {
    let backend = MemBackend::Uffd(handle.socket.clone());
    std::thread::scope(|scope| {
        let restores: Vec<_> = (0..count)
            .map(|_| scope.spawn(|| MicroVm::restore(snapshot, &backend).unwrap().0))
            .collect();
        restores.into_iter().map(|restore| restore.join().unwrap()).collect()
    })
}

/// Has all guests check all their memory at once.
fn verify_all(forks: &mut [MicroVm], snapshot: &Snapshot) {
    std::thread::scope(|scope| {
        for fork in forks {
            scope.spawn(|| {
                let verified = fork.verify(snapshot.whole).unwrap();
                assert_eq!(verified.mismatches, 0, "{verified:?}");
            });
        }
    });
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
fn real_forks_of_two_mebibyte_pages_read_and_write() {
    if kvm().unwrap().skips() {
        return;
    }
    let options = SnapshotOptions {
        huge_pages: true,
        ..SnapshotOptions::default()
    };
    // One guest that is snapshotted, then two forks.
    let Some(_pages) = HugePages::reserve(u64::from(options.mem_mib) / 2 * 2).unwrap() else {
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
