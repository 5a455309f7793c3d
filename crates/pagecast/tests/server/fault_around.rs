//! Pages that are installed together with one that faults.

use std::num::NonZeroU32;
use std::time::Instant;

use pagecast::server::{ForkOptions, ForkStatus};
use pagecast_testkit::sim_vmm::{Order, Pages, Read, Remove, RemoveRace};

use crate::fixture::{Fixture, PATIENCE, assert_reads_right, eventually, read_range};

/// The pages that a fork has got.
fn got(status: &ForkStatus) -> u64 {
    status.stats.faults.demand + status.stats.faults.around
}

fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.template.find_zeros(Instant::now() + PATIENCE);
    fixture
}

#[test]
fn a_fork_that_reads_in_order_faults_rarely_and_gets_little_that_it_does_not_read() {
    let fixture = fixture();
    let (fork, vmm) = fixture.fork("a");
    assert_reads_right(&vmm, read_range(0, 1500));
    let status = fork.status();
    let data = status.stats.faults.demand - status.stats.faults.zero;
    assert!(data < 300, "{status:?}");
    assert!(status.stats.faults.around > 800, "{status:?}");
    // The last window may reach past the end.
    assert!(got(&status) <= 1500 + 32, "{status:?}");
    // What was installed ahead is right as well.
    assert_reads_right(&vmm, Read::default());
}

#[test]
fn a_fork_that_reads_here_and_there_gets_what_it_reads() {
    let fixture = fixture();
    let (fork, vmm) = fixture.fork("a");
    let pages = Pages::range(0..2048).every(NonZeroU32::new(37).unwrap());
    let read = Read {
        pages,
        order: Order::Random(3),
        ..Read::default()
    };
    assert_reads_right(&vmm, read);
    let faults = fork.status().stats.faults;
    assert!(faults.around <= 24, "{faults:?}");
}

#[test]
fn a_fork_that_is_recorded_gets_each_page_by_itself() {
    let fixture = fixture();
    let (fork, vmm) = fixture.fork_as("a", ForkOptions::record);
    assert_reads_right(&vmm, read_range(0, 500));
    assert_eq!(fork.status().stats.faults.around, 0);
}

#[test]
fn removed_pages_among_those_that_are_read_in_order_stay_zeros() {
    let fixture = fixture();
    let (fork, vmm) = fixture.fork("a");
    vmm.run(Remove::range(300..340)).unwrap();
    vmm.run(Remove::range(700..701)).unwrap();
    eventually("the removals are read", || fork.status().stats.faults.removed == 41);
    assert_reads_right(&vmm, read_range(0, 1500));
    assert!(fork.status().stats.faults.around > 800);
    assert_reads_right(&vmm, Read::default());
}

#[test]
fn no_byte_is_wrong_where_readers_and_removals_race_with_windows() {
    let fixture = fixture();
    for seed in 0..6 {
        let (fork, vmm) = fixture.fork(&format!("race-{seed}"));
        let race = RemoveRace {
            millis: 300,
            threads: 3,
            seed,
        };
        let report = vmm.run(race).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
        assert!(report.removals > 0, "{report:?}");
        let faults = fork.status().stats.faults;
        assert!(faults.around > 0 && faults.removed > 0, "{faults:?}");
        vmm.kill().unwrap();
    }
}
