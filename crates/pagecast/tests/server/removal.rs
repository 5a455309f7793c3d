//! Memory that the guest gives back reads as zeros from then on, whatever races with it, and nobody waits for ever.

use std::num::NonZeroU32;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use pagecast_testkit::process::ProcessUse;
use pagecast_testkit::sim_vmm::{Order, Pages, RaceReport, Read, Region, Remove, RemoveRace, Share, SimVmm, Write};
use pagecast_testkit::skip::{Need, skip};
use rustix::process::Pid;
use rustix::thread::CpuSet;

use crate::fixture::{Fixture, PATIENCE, eventually, given_back, model};
use crate::scripted_source::{Access, Script};
use crate::vmm_process::{self, alone, cpu_time_of, in_page_fault, in_removal};

fn assert_right(report: &RaceReport) {
    assert_eq!((report.checked.mismatches, report.checked.stale), (0, 0), "{report:?}");
    assert!(report.removals > 0 && report.writes > 0, "nothing raced: {report:?}");
}

fn read_all(vmm: &SimVmm) {
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

#[test]
fn removed_pages_read_as_zeros_whether_touched_before_or_not() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork_with("a", |connect| pagecast_testkit::sim_vmm::Connect {
        // Removals that span two regions come as two events, at addresses that have nothing to do with each other.
        regions: vec![
            Region {
                size: 3 << 20,
                offset: 5 << 20,
            },
            Region {
                size: 5 << 20,
                offset: 0,
            },
        ],
        ..connect
    });
    let touched = Pages::range(0..1000);
    vmm.run(Read {
        pages: touched.clone(),
        ..Read::default()
    })
    .unwrap();
    // Across the end of what was touched, across the end of the first region, one page, and all around one page.
    let ranges = vec![900..1100, 700..800, 5..6, 1500..1600, 1601..1700];
    let removed: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    vmm.run(Remove { ranges }).unwrap();
    read_all(&vmm);
    // What was given back to the kernel needs not be told to us: it is zeros before and after.
    let status = fork.status();
    let told = status.stats.faults.removed;
    assert!(told <= removed && told + given_back(&status) >= removed, "{status:?}");

    let generation = NonZeroU32::MIN;
    let pages = Pages::range(950..1550);
    let threads = 2;
    vmm.run(Write {
        pages,
        generation,
        threads,
    })
    .unwrap();
    read_all(&vmm);
    // Written since, and zeros again.
    vmm.run(Remove::range(940..1540)).unwrap();
    read_all(&vmm);
    fixture.file.check_untouched().unwrap();
}

#[test]
fn one_fork_that_removes_while_it_faults_sees_no_stale_byte_and_never_hangs() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    let race = RemoveRace {
        millis: 3000,
        threads: 4,
        seed: 1,
    };
    let report = vmm.start(race).unwrap().join_within(PATIENCE).unwrap();
    assert_right(&report);
    let faults = fork.status().stats.faults;
    assert!(faults.removed > 0 && faults.retried > 0, "{faults:?}");
    fixture.file.check_untouched().unwrap();
}

#[test]
fn several_forks_that_remove_while_they_fault_see_no_stale_byte_and_never_hang() {
    let fixture = Fixture::new();
    let forks: Vec<_> = (0..4).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
    let races: Vec<_> = forks
        .iter()
        .zip(0..)
        .map(|((_, vmm), seed)| {
            vmm.start(RemoveRace {
                millis: 3000,
                threads: 2,
                seed,
            })
            .unwrap()
        })
        .collect();
    for race in races {
        assert_right(&race.join_within(PATIENCE).unwrap());
    }
    fixture.file.check_untouched().unwrap();
}

#[test]
fn threads_that_fault_on_the_same_pages_all_go_on() {
    let fixture = Fixture::new();
    let forks: Vec<_> = (0..2).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
    let reads = forks.iter().map(|(_, vmm)| {
        let read = Read {
            threads: 8,
            order: Order::Sequential,
            share: Share::Everything,
            ..Read::default()
        };
        vmm.start(read).unwrap()
    });
    for read in reads.collect::<Vec<_>>() {
        let report = read.join_within(PATIENCE).unwrap();
        assert_eq!((report.checked.pages, report.checked.mismatches), (8 * 2048, 0));
    }
}

#[test]
fn a_vmm_stopped_in_the_middle_of_a_race_costs_nothing_and_goes_on_right() {
    const WINDOW: Duration = Duration::from_millis(100);
    const STOPS: u32 = 10;
    if !alone() {
        return;
    }
    let fixture = Fixture::new();
    let (_, racing) = fixture.fork("racing");
    let (_, other) = fixture.fork("other");
    let race = racing
        .start(RemoveRace {
            millis: 3000,
            threads: 3,
            seed: 2,
        })
        .unwrap();
    let mut used = Duration::ZERO;
    for stop in 0..u64::from(STOPS) {
        vmm_process::stop(&racing);
        used += cpu_time_of(|| std::thread::sleep(WINDOW));
        // Who has nothing to do with it does not notice.
        let report = other
            .run(Read {
                pages: Pages::range(stop * 200..stop * 200 + 200),
                ..Read::default()
            })
            .unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
        vmm_process::resume(&racing);
    }
    assert_right(&race.join_within(PATIENCE).unwrap());
    // Some of it is what the test itself does. A thread that retries without a pause uses all there is.
    assert!(used < WINDOW * STOPS / 5, "{used:?} of processor time while stopped");
}

/// Makes the kernel answer every install with `EAGAIN` for most of a second: a thread of the VMM is in `madvise`, its
/// removal has been read, and it cannot run again because something more important has its processor.
fn retries_are_paced(completing: bool) {
    const WINDOW: Duration = Duration::from_millis(300);
    const ATTEMPTS: usize = 5;
    if !alone() {
        return;
    }
    let Some((ours, theirs)) = two_processors() else {
        return skip(Need::Processors(2));
    };
    // The threads of the server, and of the VMM too until it is moved, come from this one.
    rustix::thread::sched_setaffinity(None, &ours).unwrap();
    for attempt in 1..=ATTEMPTS {
        let script = Script::new(&model(8 << 20), |page| match page {
            0 => Access::HoldsWorker,
            _ => Access::Ready,
        });
        let (fixture, script) = Fixture::scripted(script, |builder| builder.workers(1));
        let (fork, vmm) = fixture.fork("a");
        let page = |page| Read {
            pages: Pages::range(page..page + 1),
            ..Read::default()
        };
        // The worker is held at page 0 until all else is as it should be; page 30 and the removal wait for it.
        let held = vmm.start(page(0)).unwrap();
        eventually("the worker is held", || script.holds() > 0);
        let removal = vmm.start(Remove::range(10..20)).unwrap();
        let waiting = vmm.start(page(30)).unwrap();
        eventually("a fault and a removal", || {
            in_page_fault(&vmm) == 2 && in_removal(&vmm) == 1
        });
        for thread in vmm_process::threads(&vmm) {
            rustix::thread::sched_setaffinity(Some(thread.id), &theirs).unwrap();
        }
        let Some(hog) = Hog::start(&theirs) else {
            script.open_gate();
            return skip("cannot take a processor for itself (chrt, CAP_SYS_NICE)");
        };
        if completing {
            // What is left is installed beside, and retried too.
            fork.complete().unwrap();
        }
        let started = Instant::now();
        let used = cpu_time_of(|| {
            script.open_gate();
            std::thread::sleep(WINDOW);
        });
        let retried = fork.status().stats.faults.retried;
        // On a busy machine it is more than was asked for.
        let window = started.elapsed();
        let parked = [held.is_done(), waiting.is_done(), removal.is_done()] == [false; 3];
        drop(hog);
        for read in [held, waiting] {
            let report = read.join_within(PATIENCE).unwrap();
            assert_eq!(report.checked.mismatches, 0, "{report:?}");
        }
        removal.join_within(PATIENCE).unwrap();
        read_all(&vmm);
        if !parked {
            println!("attempt {attempt}: the VMM got to run, which the kernel allows it now and then");
            continue;
        }
        // Two faults, and what is filled meanwhile, each tried soon at first and 100 times a second in the end.
        let pauses = u64::try_from(window.as_millis()).unwrap() / 10;
        assert!(
            (pauses / 3..=pauses * 7).contains(&retried),
            "{retried} retries in {window:?}"
        );
        assert!(
            used < window / 5,
            "{used:?} of processor time in {window:?} of parked retries"
        );
        return;
    }
    skip("the VMM got to run in every attempt");
}

#[test]
fn retries_that_stay_parked_are_paced_and_succeed_in_the_end() {
    retries_are_paced(false);
}

#[test]
fn a_completion_that_cannot_go_on_is_paced_and_succeeds_in_the_end() {
    retries_are_paced(true);
}

/// One processor for the test and one for the VMM, of those that this process may use.
fn two_processors() -> Option<(CpuSet, CpuSet)> {
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let mut single = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).map(|cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        set
    });
    Some((single.next()?, single.next()?))
}

/// Something that has a processor for itself, until it is dropped.
struct Hog(Child);

impl Hog {
    fn start(processor: &CpuSet) -> Option<Self> {
        // Ends by itself after two seconds of work, whatever becomes of this test.
        let script = "ulimit -t 2; while :; do :; done";
        let mut hog = Self(
            Command::new("chrt")
                .args(["-f", "1", "sh", "-c", script])
                .spawn()
                .ok()?,
        );
        let pid = Pid::from_child(&hog.0);
        rustix::thread::sched_setaffinity(Some(pid), processor).ok()?;
        // It is at work once it has used the processor, and it does only if it was allowed to.
        let mut refused = false;
        eventually("the hog has its processor", || {
            refused = hog.0.try_wait().unwrap().is_some();
            let at_work = ProcessUse::of(hog.0.id()).is_ok_and(|used| used.cpu_time >= Duration::from_millis(20));
            refused || at_work
        });
        (!refused).then_some(hog)
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        // Where it is dead already, all is well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
