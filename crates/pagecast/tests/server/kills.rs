//! VMMs die at any moment, hundreds of times: nothing is left of them, and nobody else notices.

use std::sync::Arc;
use std::time::Duration;

use pagecast::Template;
use pagecast::server::{ForkOptions, ForkState, Prefault, Server};
use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::process::ProcessUse;
use pagecast_testkit::sim_vmm::{Connect, Latency, Order, Pages, Read, RemoveRace, SimVmm};
use pagecast_testkit::template_file::TemplateModel;
use rustix::process::{Pid, Signal};

use crate::fixture::{
    Fixture, PATIENCE, assert_open, assert_right, eventually, held_uffds, model, open_fds, read_range, short_deadlines,
};
use crate::scripted_source::{Access, Script, ScriptedSource};
use crate::vmm_process::alone;

/// What a VMM is at when it is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    BeforeConnecting,
    Connecting,
    InHandshake,
    Faulting,
    Removing,
}

const MOMENTS: [Moment; 5] = [
    Moment::BeforeConnecting,
    Moment::Connecting,
    Moment::InHandshake,
    Moment::Faulting,
    Moment::Removing,
];

/// Makes a fork, kills its VMM at some moment, and forgets the fork.
fn kill_one(fixture: &Fixture, id: &str, moment: Moment, random: &mut fastrand::Rng) {
    let fork = fixture.register(id);
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect::new(fork.socket_path(), fixture.file.model());
    let read = Read {
        threads: 4,
        order: Order::Random(random.u64(..)),
        ..Read::default()
    };
    let race = RemoveRace {
        millis: 60_000,
        threads: 2,
        seed: random.u64(..),
    };
    match moment {
        Moment::BeforeConnecting => {}
        Moment::Connecting => drop(vmm.start(connect).unwrap()),
        Moment::InHandshake => {
            let others = held_uffds();
            let begun = RawHandshake::new(fork.socket_path(), r#"[{"base_host_"#, &[FdKind::Uffd]);
            drop(vmm.start(begun).unwrap());
            eventually("somebody connects", || held_uffds() > others);
        }
        Moment::Faulting => {
            vmm.run(connect).unwrap();
            drop(vmm.start(read).unwrap());
        }
        Moment::Removing => {
            vmm.run(connect).unwrap();
            drop(vmm.start(race).unwrap());
        }
    }
    // Not to wait for anything, but to be anywhere in it.
    std::thread::sleep(Duration::from_micros(random.u64(0..4000)));
    vmm.kill().unwrap();
    let expected = match moment {
        // It may not have come this far, or further than that.
        Moment::BeforeConnecting | Moment::Connecting => None,
        Moment::InHandshake => Some(ForkState::Failed),
        Moment::Faulting | Moment::Removing => Some(ForkState::Exited),
    };
    if let Some(expected) = expected {
        let status = fork.wait(PATIENCE, ForkState::is_end);
        assert_eq!(status.state, expected, "{moment:?}: {status:?}");
    }
    forget(&fixture.server, id);
}

/// How many threads this process has, without those that workers start when they first fill one of several forks, and keep.
fn threads_but_fillers() -> usize {
    let names = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| !name.trim_end().ends_with("-fill")).count()
}

/// Forgets a fork as soon as the server agrees that its VMM is dead.
fn forget(server: &Server, id: &str) {
    let fork = server.fork(&id.parse().unwrap()).unwrap();
    eventually("the fork can be forgotten", || fork.forget().is_ok());
}

#[test]
fn hundreds_of_vmms_killed_at_random_moments_leave_nothing_behind() {
    const WARM_UP: u64 = 40;
    const KILLS: u64 = 320;
    if !alone() {
        return;
    }
    let fixture = Fixture::new();
    let steady: Vec<_> = (0..2).map(|n| fixture.fork(&format!("steady-{n}"))).collect();
    // The sockets that they were listened for at are closed soon after that.
    eventually("only their handshake sockets are left", || {
        open_fds().get("socket") == Some(&steady.len())
    });
    let mut random = fastrand::Rng::with_seed(1);
    let (before, fds_before) = (threads_but_fillers(), open_fds());
    // Later: allocators and stacks settle with the first VMMs.
    let mut rss_before = 0;
    for (n, moment) in (0..WARM_UP + KILLS).zip(MOMENTS.iter().cycle()) {
        if n == WARM_UP {
            rss_before = own_use().rss_bytes;
        }
        kill_one(&fixture, &format!("killed-{n}"), *moment, &mut random);
        // The others are served all the while: pages that they have not touched yet.
        let (_, vmm) = &steady[usize::try_from(n % 2).unwrap()];
        let pages = Pages::range(n * 5..n * 5 + 5);
        let read = vmm
            .start(Read {
                pages,
                ..Read::default()
            })
            .unwrap();
        let report = read.join_within(PATIENCE).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
    }
    // The threads that read for the test end soon after their VMMs.
    eventually("no thread is left", || threads_but_fillers() <= before);
    assert_open(&fds_before);
    let grown = own_use().rss_bytes.saturating_sub(rss_before);
    assert!(grown < 4 << 20, "grew by {grown} bytes");
    let sockets = std::fs::read_dir(fixture.folder.path()).unwrap();
    assert_eq!(sockets.count(), 0, "socket files");
    assert_eq!(fixture.server.forks().len(), steady.len());

    fixture.server.close(PATIENCE).unwrap();
    for (fork, vmm) in &steady {
        assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
        let report = vmm.run(Read::default()).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
    }
    fixture.file.check_untouched().unwrap();
}

#[test]
fn a_fork_whose_vmm_died_before_it_connected_ends_by_its_deadline() {
    let fixture = Fixture::with(1 << 20, |builder| builder.deadlines(short_deadlines()));
    let fork = fixture.register("a");
    SimVmm::spawn().unwrap().kill().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(
        status.reason.as_ref().map(|reason| reason.code()),
        Some("connect_deadline")
    );
    eventually("its socket is gone", || !fork.socket_path().exists());
    forget(&fixture.server, "a");
}

fn own_use() -> ProcessUse {
    ProcessUse::of(std::process::id()).unwrap()
}

#[test]
fn vmms_killed_while_the_server_closes_hold_up_nothing_and_leave_nothing() {
    const ROUNDS: u64 = 60;
    const FORKS: usize = 4;
    if !alone() {
        return;
    }
    let mut random = fastrand::Rng::with_seed(2);
    let before = own_use();
    // Later: allocators and stacks settle with the first servers.
    let mut rss_before = 0;
    for round in 0..ROUNDS {
        if round == 5 {
            rss_before = own_use().rss_bytes;
        }
        let fixture = Fixture::new();
        let forks: Vec<_> = (0..FORKS).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
        let reads: Vec<_> = forks
            .iter()
            .map(|(_, vmm)| {
                let read = Read {
                    threads: 2,
                    order: Order::Random(round),
                    ..Read::default()
                };
                vmm.start(read).unwrap()
            })
            .collect();
        let (killed, kept) = forks.split_at(FORKS / 2);
        std::thread::scope(|scope| {
            let close = scope.spawn(|| fixture.server.close(PATIENCE));
            for (_, vmm) in killed {
                // Anywhere in the close, which takes some milliseconds.
                std::thread::sleep(Duration::from_micros(random.u64(0..6000)));
                let pid = Pid::from_raw(vmm.pid().try_into().unwrap()).unwrap();
                rustix::process::kill_process(pid, Signal::KILL).unwrap();
            }
            close.join().unwrap().unwrap();
        });
        for (fork, _) in killed {
            let state = fork.status().state;
            assert!(matches!(state, ForkState::Exited | ForkState::Complete), "{state}");
        }
        for ((fork, vmm), read) in kept.iter().zip(reads.into_iter().skip(killed.len())) {
            assert_eq!(fork.status().state, ForkState::Complete);
            assert_eq!(read.join_within(PATIENCE).unwrap().checked.mismatches, 0);
            assert_eq!(vmm.run(Read::default()).unwrap().checked.mismatches, 0);
        }
    }
    eventually("no file descriptor is left", || own_use().fds <= before.fds);
    eventually("no thread is left", || own_use().threads <= before.threads);
    // The allocator keeps some 10 MiB of what the threads of 60 servers had, however many there were; what a server
    // works with, kept for each of them, would be 30 MiB.
    let grown = own_use().rss_bytes.saturating_sub(rss_before);
    assert!(grown < 20 << 20, "grew by {grown} bytes");
}

/// Whatever a step of filling waits for: here for the template, as in the kernel for the end of an address space.
#[test]
fn a_fork_that_is_being_filled_holds_up_no_other_of_its_worker_not_even_when_it_dies() {
    let script = Script::new(&model(8 << 20), |page| match page {
        1500 => Access::HoldsWorker,
        _ => Access::Ready,
    });
    let (fixture, script) = Fixture::scripted(script, |builder| builder.workers(1));
    let (filled_fork, filled) = fixture.fork("filled");
    let (_, other) = fixture.fork("other");
    filled_fork.complete().unwrap();
    eventually("a step that does not end", || script.holds() == 1);
    assert_right(other.start(read_range(0, 700)).unwrap());
    filled.kill().unwrap();
    let status = filled_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Exited, "{status:?}");
    assert_right(other.start(read_range(700, 1400)).unwrap());
    assert_eq!(script.holds(), 1);
    script.open_gate();
    // What fills goes on with another.
    fixture.server.close(PATIENCE).unwrap();
}

/// A measurement, for `docs/performance.md`: what a fork waits for at most while another one of its worker, half prefaulted, is
/// killed.
#[test]
#[ignore = "a measurement that takes minutes and 4 GiB"]
fn what_a_fork_waits_for_while_another_of_its_worker_dies_in_its_prefault() {
    const ROUNDS: u64 = 20;
    const FAULTS: u64 = 800;
    const SIZE: u64 = 4 << 30;
    let fixture = Fixture::with(64 << 20, |builder| builder.workers(1));
    let (_, other) = fixture.fork("other");
    let mut slowest = Vec::new();
    for round in 0..ROUNDS {
        let template = TemplateModel::of_data(SIZE, 1);
        let script = Script::new(&template, |_| Access::Ready);
        let source = Template::from_source(Arc::new(ScriptedSource(Arc::new(script))));
        let id = format!("big-{round}");
        let options = ForkOptions::new(fixture.folder.path().join(&id)).prefault(Prefault::All);
        let fork = fixture.server.register(id.parse().unwrap(), &source, &options).unwrap();
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(Connect::new(fork.socket_path(), &template)).unwrap();
        // As long as it takes: busy machines are measured too.
        while fork.status().stats.installed_bytes <= SIZE / 2 {
            std::thread::sleep(Duration::from_millis(2));
        }
        let first = round * FAULTS;
        let faulting = other.start(Latency {
            pages: Pages::range(first..first + FAULTS),
            order: Order::Random(round),
        });
        vmm.kill().unwrap();
        let report = faulting.unwrap().join_within(PATIENCE).unwrap();
        fork.wait(PATIENCE, ForkState::is_end);
        println!(
            "median {} us, slowest {} us",
            report.p50_ns / 1000,
            report.max_ns / 1000
        );
        slowest.push(report.max_ns / 1000);
    }
    slowest.sort_unstable();
    println!("slowest of each round, in us: {slowest:?}");
}
