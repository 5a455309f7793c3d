//! A read that fails is tried again where that may help, and needs no thread that could not be had.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pagecast::server::{Deadlines, ForkOptions, ForkState, Prefault, chain};
use pagecast_testkit::cgroup::Cgroup;
use pagecast_testkit::sim_vmm::{Read, Remove};

use crate::fixture::{
    Fixture, PATIENCE, assert_reads_right, assert_right, eventually, model, read_everything, read_range,
};
use crate::scripted_source::{Access, Script};
use crate::vmm_process::alone;

const SIZE: u64 = 8 << 20;

/// A template with pages that fail a few times.
fn failing(access: impl Fn(u64) -> Access + Send + Sync + 'static) -> (Fixture, Arc<Script>) {
    Fixture::scripted(Script::new(&model(SIZE), access), |builder| builder)
}

#[test]
fn a_read_that_fails_for_a_while_is_tried_again_until_it_does_not() {
    let (fixture, _) = failing(|page| match page % 8 {
        5 => Access::Fails(1 + page % 3),
        6 => Access::Slow(Duration::ZERO),
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    assert_reads_right(&vmm, read_everything(1));
    assert_eq!(fork.status().state, ForkState::Serving);
    assert!(fixture.template.slow_reads().failed > 0);
}

#[test]
fn a_fault_whose_page_cannot_be_read_at_once_is_tried_again() {
    let (fixture, _) = failing(|page| match page % 8 {
        5 => Access::FailsAtOnce(1 + page % 3),
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    assert_reads_right(&vmm, read_everything(1));
    assert_eq!(fork.status().state, ForkState::Serving);
}

/// Such as `fstat` with ESTALE or EIO.
#[test]
fn a_template_that_cannot_be_compared_for_a_while_has_not_changed() {
    let (fixture, script) = failing(|page| match page % 2 {
        0 => Access::Slow(Duration::ZERO),
        _ => Access::Ready,
    });
    let fork = fixture.register("a");
    let vmm = pagecast_testkit::sim_vmm::SimVmm::spawn().unwrap();
    // At the handshake first, then with pages.
    script.failing_checks.store(40, Ordering::SeqCst);
    let connect = pagecast_testkit::sim_vmm::Connect::new(fork.socket_path(), fixture.file.model());
    vmm.run(connect).unwrap();
    let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
    assert_reads_right(&vmm, read_everything(1));
    assert_eq!(script.failing_checks.load(Ordering::SeqCst), 0);
    assert_eq!(fork.status().state, ForkState::Serving);
}

#[test]
fn a_completion_goes_on_where_a_read_fails_for_a_while() {
    let (fixture, script) = failing(|page| match page {
        600 | 640 => Access::Fails(3),
        1100 | 1300 => Access::FailsAtOnce(2),
        1500.. => Access::Slow(Duration::ZERO),
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    script.failing_checks.store(5, Ordering::SeqCst);
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_reads_right(&vmm, Read::default());
}

#[test]
fn a_prefault_goes_on_where_a_read_fails_for_a_while() {
    let (fixture, _) = failing(|page| match page {
        600 | 640 => Access::Fails(3),
        1100 => Access::FailsAtOnce(2),
        _ => Access::Ready,
    });
    let all = |options: ForkOptions| options.prefault(Prefault::All);
    let (fork, vmm) = fixture.fork_as("a", all);
    eventually("all is there", || {
        fork.status().stats.faults.prefaulted >= SIZE / 4096 - 200
    });
    assert_reads_right(&vmm, Read::default());
}

#[test]
fn a_read_that_keeps_failing_ends_its_fork_at_the_deadline_with_what_failed() {
    let script = Script::new(&model(SIZE), |page| match page {
        1024.. => Access::Broken,
        _ => Access::Ready,
    });
    let deadline = Duration::from_secs(2);
    let (fixture, script) = Fixture::scripted(script, |builder| {
        builder.workers(1).deadlines(Deadlines {
            fault: deadline,
            ..Deadlines::default()
        })
    });
    let (fork, vmm) = fixture.fork("a");
    let (_, other) = fixture.fork("other");
    let read = vmm.start(read_range(1100, 1101)).unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Failed, "{status:?}");
    let reason = status.reason.unwrap();
    let text = chain(reason.as_ref());
    assert_eq!(reason.code(), "template_unreadable", "{text}");
    // 1, 2, 4 … 500 ms, 500 ms: 12 fit, and fewer where this machine is busy.
    let tries = script.reads();
    assert!((2..=13).contains(&tries), "{tries} tries: {text}");
    assert!(text.contains(&format!("{tries} tries within 2")), "{text}");
    assert!(text.contains("scripted to fail"), "{text}");
    assert!(read.join_within(PATIENCE).is_err());
    assert_reads_right(&other, read_range(0, 1024));
}

#[test]
fn a_page_removed_while_its_read_fails_gets_zeros() {
    let (fixture, script) = failing(|page| match page {
        1024.. => Access::Broken,
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    let read = vmm.start(read_range(1030, 1031)).unwrap();
    eventually("a read that failed", || script.reads() > 0);
    vmm.run(Remove::range(1029..1032)).unwrap();
    let report = read.join_within(PATIENCE).unwrap();
    assert_eq!((report.checked.mismatches, report.checked.stale), (0, 0), "{report:?}");
    assert_eq!(fork.status().state, ForkState::Serving);
}

/// Takes this process into a cgroup in which no thread can begin.
fn without_threads() -> Option<Cgroup> {
    if !alone() {
        return None;
    }
    let cgroup = Cgroup::of_threads().unwrap()?;
    cgroup.take(std::process::id()).unwrap();
    cgroup.limit(0).unwrap();
    std::thread::Builder::new().spawn(|| {}).unwrap_err();
    Some(cgroup)
}

#[test]
fn a_cold_fault_needs_no_thread_that_is_not_there_already() {
    let (fixture, _) = failing(|page| match page {
        1024.. => Access::Slow(Duration::ZERO),
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    let Some(cgroup) = without_threads() else { return };
    assert_reads_right(&vmm, Read::default());
    assert_eq!(fork.status().state, ForkState::Serving);
    drop(cgroup);
}

#[test]
fn a_completion_needs_no_thread_that_is_not_there_already() {
    let (fixture, _) = failing(|page| match page {
        1024.. => Access::Slow(Duration::ZERO),
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    let Some(cgroup) = without_threads() else { return };
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_reads_right(&vmm, Read::default());
    drop(cgroup);
}

#[test]
fn a_fault_behind_a_stuck_reader_is_read_once_there_are_threads_again() {
    let (fixture, script) = failing(|page| match page {
        2000.. => Access::Gated,
        1024.. => Access::Slow(Duration::ZERO),
        _ => Access::Ready,
    });
    let (fork, vmm) = fixture.fork("a");
    let Some(cgroup) = without_threads() else { return };
    let stuck = vmm.start(read_range(2000, 2001)).unwrap();
    eventually("a stuck reader", || script.reads() == 1);
    let behind = vmm.start(read_range(1100, 1101)).unwrap();
    eventually("a fault behind it", || fork.status().stats.faults.slow == 2);
    cgroup.limit(1000).unwrap();
    assert_right(behind);
    script.open_gate();
    assert_right(stuck);
    drop(cgroup);
}
