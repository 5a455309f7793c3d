//! Forks get the right bytes: the real kernel, VMMs in processes of their own.

use std::sync::Arc;

use crate::fixture::{Fixture, PATIENCE, asked_or_given_back, given_back};
use pagecast::Template;
use pagecast::server::ForkState;
use pagecast::template::{MemFile, PageSource as _};
use pagecast_testkit::sim_vmm::{Order, Read, Share};

#[test]
fn one_fork_reads_what_the_template_holds() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("one");
    let read = Read {
        threads: 4,
        order: Order::Random(7),
        share: Share::Everything,
        ..Read::default()
    };
    let report = vmm.run(read).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
    let status = fork.status();
    println!("{status:#?}");
    assert!(asked_or_given_back(&status) >= 2048, "{status:?}");
    vmm.kill().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Exited, "{status:?}");
    // Its numbers stay, and fit each other: every fault was answered by an install, and that is a part of it.
    let (faults, installs) = (fork.fault_latency(), fork.install_latency());
    assert_eq!(faults.count(), installs.count());
    assert!(
        faults.count() + status.stats.faults.around + given_back(&status) >= 2048
            && faults.count() <= status.stats.faults.demand,
        "{status:?}"
    );
    assert!(faults.sum() > installs.sum() && !installs.sum().is_zero());
    assert_eq!(faults.summary(), status.stats.fault_latency_us);
    fixture.file.check_untouched().unwrap();
}

#[test]
fn twenty_forks_read_what_the_template_holds_at_once() {
    let fixture = Fixture::new();
    let forks: Vec<_> = (0..20).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
    let jobs: Vec<_> = forks
        .iter()
        .enumerate()
        .map(|(n, (_, vmm))| {
            vmm.start(Read {
                threads: 4,
                order: Order::Random(n as u64),
                share: Share::Everything,
                ..Read::default()
            })
            .unwrap()
        })
        .collect();
    for job in jobs {
        let report = job.join().unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
    }
    fixture.server.close(PATIENCE).unwrap();
    for (fork, vmm) in &forks {
        assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
        let report = vmm.run(Read::default()).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
    }
    fixture.file.check_untouched().unwrap();
}

#[test]
fn a_fork_is_known_by_its_name_with_the_size_of_its_memory() {
    let fixture = Fixture::new();
    let fork = fixture.register("waiting");
    assert_eq!(
        fixture.server.fork(fork.id()).unwrap().status().memory_bytes,
        0,
        "before the handshake"
    );
    let (fork, _vmm) = fixture.fork("serving");
    let status = fixture.server.fork(fork.id()).unwrap().status();
    assert_eq!((status.state, status.memory_bytes), (ForkState::Serving, 8 << 20));
    assert!(fixture.server.fork(&"nobody".parse().unwrap()).is_none());
}

#[test]
fn a_caller_that_keeps_its_mem_file_sees_what_its_forks_find_out() {
    let mut fixture = Fixture::new();
    let mem_file = Arc::new(MemFile::open(fixture.file.path()).unwrap());
    fixture.template = Template::from_source(Arc::clone(&mem_file));
    let known_before = mem_file.zeros().known_bytes();
    let (_, vmm) = fixture.fork("one");
    assert_eq!(vmm.run(Read::default()).unwrap().checked.mismatches, 0);
    assert!(mem_file.zeros().known_bytes() > known_before);
}
