//! What a fork is given ahead of its faults: runs of zeros, its working set, everything.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, mpsc};

use pagecast::server::{ForkEvent, ForkOptions, ForkState, Prefault};
use pagecast::template::{Planned, PrefaultPlan, PrefaultTally, Recording, TemplateOffset, WorkingSet};
use pagecast_testkit::sim_vmm::{Order, Pages, Read, RemoveRace};

use crate::fixture::{
    Fixture, PATIENCE, assert_lives_on, assert_reads_right, assert_right, eventually, given_back, model,
    read_everything, read_range,
};
use crate::scripted_source::{Access, Script};

/// All pages of the fixture's template that are not zeros.
const SIZE: u64 = 8 << 20;
const PAGES: u64 = SIZE / 4096;

/// A fixture that tells its events.
/// A server that installs a page a fault, so that each page counts, and its events.
fn observed(workers: usize) -> (Fixture, mpsc::Receiver<ForkEvent>) {
    let (send, events) = mpsc::channel();
    let fixture = Fixture::with(SIZE, |builder| {
        builder
            .workers(workers)
            .fault_around(1)
            .observer(move |event| drop(send.send(event)))
    });
    (fixture, events)
}

fn recorded(events: &mpsc::Receiver<ForkEvent>) -> Arc<Recording> {
    loop {
        if let ForkEvent::Recorded { recording, .. } = events.recv_timeout(PATIENCE).unwrap() {
            return recording;
        }
    }
}

fn tally(events: &mpsc::Receiver<ForkEvent>) -> PrefaultTally {
    loop {
        if let ForkEvent::Prefaulted { tally, .. } = events.recv_timeout(PATIENCE).unwrap() {
            return tally;
        }
    }
}

/// A working set of these pages, in this order.
fn working_set(pages: impl IntoIterator<Item = u64>) -> Arc<WorkingSet> {
    let mut recording = Recording::new(pagecast_uffd::ByteLen::new(SIZE));
    for page in pages {
        recording.push(TemplateOffset::new(page * 4096));
    }
    Arc::new(WorkingSet::of(&recording))
}

#[test]
fn what_a_fork_touches_first_is_recorded_in_that_order_and_the_window_ends_by_itself() {
    let (fixture, events) = observed(1);
    let (_fork, vmm) = fixture.fork_as("a", ForkOptions::record);
    let read = Read {
        pages: Pages::range(400..600),
        order: Order::Random(5),
        ..Read::default()
    };
    assert_reads_right(&vmm, read);
    let recording = recorded(&events);
    let pages: Vec<u64> = recording.pages().map(|at| at.get() / 4096).collect();
    let mut sorted = pages.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (400..600).collect::<Vec<_>>());
    assert_ne!(pages, sorted, "in the order of touches, which was random");
    // The window is over: what comes later is not recorded, and nothing is left to do.
    assert_lives_on(&vmm);
    assert!(
        events
            .try_iter()
            .all(|event| !matches!(event, ForkEvent::Recorded { .. }))
    );
}

#[test]
fn a_fork_that_ends_early_is_recorded_all_the_same() {
    let (fixture, events) = observed(1);
    let (_fork, vmm) = fixture.fork_as("a", ForkOptions::record);
    assert_reads_right(&vmm, read_range(0, 10));
    vmm.kill().unwrap();
    assert_eq!(recorded(&events).len(), 10);
}

#[test]
fn a_working_set_is_installed_before_it_is_asked_for() {
    let (fixture, events) = observed(2);
    // Without the long runs of zeros, which are given back.
    let set = working_set((400..1000).chain(0..50));
    fixture.template.set_working_set(Some(Arc::clone(&set)));
    let (fork, vmm) = fixture.fork("a");
    // What is held out depends on the number of the fork.
    let plan = PrefaultPlan::new(set, Some(1));
    eventually("the working set is there", || {
        fork.status().stats.faults.prefaulted == 650 - plan.held_out()
    });
    let before = fork.status().stats.faults.demand;
    assert_eq!(before, 0, "nobody has asked for anything yet");
    assert_reads_right(&vmm, read_range(400, 1000));
    let in_range = (400..1000).map(|page| plan.planned(TemplateOffset::new(page * 4096)));
    let held_out = in_range.filter(|planned| *planned == Planned::HeldOut).count();
    assert_eq!(fork.status().stats.faults.demand, held_out as u64);
    // Outside of it, as ever.
    assert_reads_right(&vmm, Read::default());
    let tally = tally(&events);
    assert_eq!((tally.planned, tally.held_out), (650, plan.held_out()));
    assert_eq!((tally.held_out_used, tally.late), (tally.held_out, 0), "{tally:?}");
    assert!(tally.missed > 500, "{tally:?}");
    assert_lives_on(&vmm);
    assert_eq!(fixture.template.prefault_score().forks, 1);
    fixture.file.check_untouched().unwrap();
}

#[test]
fn without_prefault_and_fault_around_nothing_is_installed_ahead() {
    let fixture = Fixture::with(SIZE, |builder| builder.fault_around(1));
    fixture.template.set_working_set(Some(working_set(400..1000)));
    let (none, vmm) = fixture.fork_as("none", |options| options.prefault(Prefault::None));
    let (recorded, other) = fixture.fork_as("recorded", ForkOptions::record);
    for vmm in [&vmm, &other] {
        assert_reads_right(vmm, read_range(400, 1000));
    }
    for fork in [none, recorded] {
        let status = fork.status();
        assert_eq!((status.stats.faults.demand, status.stats.faults.prefaulted), (600, 0));
    }
}

#[test]
fn a_fork_with_all_its_memory_ahead_is_still_served() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork_as("a", |options| options.prefault(Prefault::All));
    eventually("all is there", || {
        let status = fork.status();
        status.stats.faults.prefaulted + given_back(&status) == PAGES
    });
    assert_reads_right(&vmm, read_everything(1));
    let status = fork.status();
    assert_eq!(
        (status.state, status.stats.faults.demand),
        (ForkState::Serving, 0),
        "{status:?}"
    );
    // What it gives back is noticed.
    assert_lives_on(&vmm);
    assert!(fork.status().stats.faults.removed > 0);
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(fork.status().state, ForkState::Complete);
    assert_lives_on(&vmm);
}

#[test]
fn pages_removed_while_they_are_prefaulted_are_never_the_templates_again() {
    for (threads, seed) in [(1, 0), (4, 1), (1, 2), (4, 3)] {
        let threads = NonZeroUsize::new(threads).unwrap();
        let fixture = Fixture::with(SIZE, |builder| builder.fill_threads(threads));
        fixture.template.set_working_set(Some(working_set(0..PAGES)));
        let (fork, vmm) = fixture.fork_as("a", |options| options.prefault(Prefault::All));
        let race = RemoveRace {
            millis: 200,
            threads: 3,
            seed,
        };
        let report = vmm.run(race).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
        assert_lives_on(&vmm);
        assert_eq!(fork.status().state, ForkState::Serving);
    }
}

#[test]
fn twenty_forks_that_start_at_once_are_all_prefaulted_and_another_is_served_meanwhile() {
    let fixture = Fixture::new();
    let (running, runner) = fixture.fork_as("running", |options| options.prefault(Prefault::None));
    let read = runner.start(read_everything(1)).unwrap();
    fixture.template.set_working_set(Some(working_set(0..PAGES)));
    let forks: Vec<_> = (0..20).map(|index| fixture.fork(&format!("fork-{index}"))).collect();
    assert_right(read);
    for (fork, vmm) in &forks {
        assert_reads_right(vmm, Read::default());
        assert_eq!(fork.status().state, ForkState::Serving);
    }
    assert_eq!(running.status().stats.faults.prefaulted, 0);
    assert!(forks.iter().all(|(fork, _)| fork.status().stats.faults.prefaulted > 0));
}

/// Twenty forks, of which the first is at its very first fill until all others are there, and the template's pages as they
/// were read then: of the twenty and, with `faulting`, of a fork that had been running and faults meanwhile, on page 1500.
fn twenty_at_once(faulting: bool) -> Vec<Range<u64>> {
    let script = Script::new(&model(SIZE), |page| match page {
        0 => Access::HoldsWorker,
        _ => Access::Ready,
    });
    let (fixture, script) = Fixture::scripted(script, |builder| builder.workers(1).fill_threads(NonZeroUsize::MIN));
    let (_running, runner) = fixture.fork_as("running", |options| options.prefault(Prefault::None));
    let forks: Vec<_> = (0..20)
        .map(|index| fixture.fork_as(&format!("fork-{index}"), |options| options.prefault(Prefault::All)))
        .collect();
    eventually("the first fill is begun", || script.holds() == 1);
    if faulting {
        assert_right(runner.start(read_range(1500, 1501)).unwrap());
    }
    script.open_gate();
    for (fork, vmm) in &forks {
        eventually("all is there", || fork.status().stats.faults.prefaulted == PAGES);
        assert_reads_right(vmm, Read::default());
        assert_eq!(fork.status().stats.faults.demand, 0);
    }
    script.accesses()
}

#[test]
fn a_fault_waits_for_no_fill_however_many_forks_start_at_once() {
    let accesses = twenty_at_once(true);
    let fault = accesses.iter().position(|pages| *pages == (1500..1501)).unwrap();
    assert_eq!(fault, 1, "{:?}", &accesses[..=fault]);
}

#[test]
fn forks_that_start_at_once_are_prefaulted_by_turns() {
    // A fault, and the timer that it sets, would cut steps off.
    let accesses = twenty_at_once(false);
    let fills: Vec<_> = accesses
        .into_iter()
        .filter(|pages| pages.end - pages.start > 1)
        .collect();
    let first_done = fills.iter().position(|pages| pages.end == PAGES).unwrap();
    // Two steps of 1 MiB: one that the others have not had, one that the first fork was ahead.
    let behind = PAGES - 512;
    let as_far = fills[..first_done].iter().filter(|pages| pages.contains(&behind));
    assert_eq!(
        as_far.count(),
        20,
        "when the first fork has all, the others are not far"
    );
}

#[test]
fn a_working_set_that_cannot_be_read_is_given_up_and_kills_nobody() {
    let script = Script::new(&model(SIZE), |page| match page {
        0..1000 => Access::Ready,
        _ => Access::Broken,
    });
    let (fixture, _script) = Fixture::scripted(script, |builder| builder);
    fixture.template.set_working_set(Some(working_set(0..2000)));
    let (fork, vmm) = fixture.fork("a");
    assert_reads_right(&vmm, read_range(0, 1000));
    let status = fork.status();
    assert_eq!(
        (status.state, status.reason.is_none()),
        (ForkState::Serving, true),
        "{status:?}"
    );
}

#[test]
fn a_prefault_that_nobody_uses_is_switched_off_and_another_working_set_switches_it_on() {
    let (fixture, events) = observed(2);
    fixture.template.set_working_set(Some(working_set(0..1900)));
    // About seven pages are held out of each, and 64 are enough to tell.
    let forks: Vec<_> = (0..20).map(|index| fixture.fork(&format!("fork-{index}"))).collect();
    for (_, vmm) in &forks {
        assert_reads_right(vmm, read_range(1900, 2000));
    }
    for _ in &forks {
        let tally = tally(&events);
        assert_eq!((tally.missed, tally.held_out_used), (100, 0));
    }
    let score = fixture.template.prefault_score();
    assert!(score.switched_off && score.precision == Some(0.0), "{score:?}");
    let (without, vmm) = fixture.fork("without");
    assert_reads_right(&vmm, Read::default());
    assert_eq!(without.status().stats.faults.prefaulted, 0);
    fixture.template.set_working_set(Some(working_set(1900..2000)));
    let (with, _vmm) = fixture.fork("with");
    eventually("it is prefaulted", || with.status().stats.faults.prefaulted > 50);
}
