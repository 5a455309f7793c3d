//! Completing and killing single forks: what is asked of one happens to that one, whatever else is asked of the server.

use std::num::NonZeroU64;
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pagecast::Template;
use pagecast::server::{CloseError, Deadlines, Error, ForkEvent, ForkState, NotEnoughMemory};
use pagecast_testkit::PageSize;
use pagecast_testkit::cgroup::Cgroup;
use pagecast_testkit::hugepages::HugePages;
use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::sim_vmm::{Connect, EndRaces, Read, RegisterAgain, RemoveRace, SimVmm};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};

use crate::fixture::{
    Fixture, PATIENCE, assert_lives_on, assert_reads_right, assert_right, big_fork, eventually, failed_with,
    half_stuck, held_uffds, model, read_everything, read_range, too_big,
};
use crate::scripted_source::{Access, Script};

const SIZE: u64 = 8 << 20;

fn not_enough(result: Result<(), Error>) -> NotEnoughMemory {
    match result {
        Err(Error::NotEnoughMemory(missing)) => missing,
        other => panic!("there is no room for it: {other:?}"),
    }
}

#[test]
fn a_fork_completed_while_it_faults_lives_on_and_the_others_are_served() {
    let fixture = Fixture::new();
    let (going_fork, going) = fixture.fork("going");
    let (staying_fork, staying) = fixture.fork("staying");
    let reads = [&going, &staying].map(|vmm| vmm.start(read_everything(1)).unwrap());
    eventually("faults", || going_fork.status().stats.faults.demand > 0);
    going_fork.complete().unwrap();
    // Again, while it is at it or done already.
    going_fork.complete().unwrap();
    let status = going_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert!(status.reason.is_none(), "{status:?}");
    going_fork.complete().unwrap();
    reads.into_iter().for_each(assert_right);
    assert_lives_on(&going);
    assert_lives_on(&staying);
    assert_eq!(staying_fork.status().state, ForkState::Serving);
    // It no longer needs the server, so it can be forgotten; and the server goes on.
    going_fork.forget().unwrap();
    let (_, late) = fixture.fork("late");
    assert_reads_right(&late, Read::default());
    fixture.server.close(PATIENCE).unwrap();
    fixture.file.check_untouched().unwrap();
}

#[test]
fn a_fork_completed_while_it_gives_memory_back_leaves_no_thread_behind() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    let race = vmm
        .start(RemoveRace {
            millis: 60_000,
            threads: 2,
            seed: 1,
        })
        .unwrap();
    eventually("removals", || fork.status().stats.faults.removed > 100);
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert!(!race.is_done(), "nothing raced with the completion");
    vmm.run(EndRaces).unwrap();
    let report = race.join_within(PATIENCE).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
    assert_lives_on(&vmm);
}

#[test]
fn a_completion_that_nobody_waits_for_keeps_its_rate() {
    const MIB_A_SECOND: u64 = 4;
    let rate = NonZeroU64::new(MIB_A_SECOND << 20);
    let fixture = Fixture::with(SIZE, |builder| builder.completion_rate(rate));
    let (fork, vmm) = fixture.fork("slow");
    let began = Instant::now();
    fork.complete().unwrap();
    assert_reads_right(&vmm, read_range(500, 520));
    assert_eq!(fork.wait(PATIENCE, ForkState::is_end).state, ForkState::Complete);
    let took = began.elapsed();
    // Some 6 MiB of data, of which the first and the last step are not waited for.
    assert!(took > Duration::from_millis(500), "{took:?}");
    assert_lives_on(&vmm);
}

#[test]
fn a_close_does_not_wait_for_a_completion_that_is_held_to_its_rate() {
    // A byte a second: the pause after its first step is longer than anybody waits.
    let fixture = Fixture::with(SIZE, |builder| builder.completion_rate(Some(NonZeroU64::MIN)));
    let (fork, vmm) = fixture.fork("a");
    fork.complete().unwrap();
    eventually("its first step", || fork.status().stats.installed_bytes > 0);
    assert_eq!(fork.status().state, ForkState::Serving, "held to its rate");
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(fork.status().state, ForkState::Complete);
    assert_lives_on(&vmm);
}

#[test]
fn what_cannot_be_completed_says_why() {
    let fixture = Fixture::new();
    let waiting = fixture.register("waiting");
    let refused = waiting.complete();
    assert!(matches!(refused, Err(Error::ForkWaiting(_))), "{refused:?}");
    assert_eq!(waiting.status().state, ForkState::Waiting);

    for (name, state) in [("exited", ForkState::Exited), ("failed", ForkState::Failed)] {
        let (fork, vmm) = fixture.fork(name);
        if state == ForkState::Exited {
            vmm.kill().unwrap();
        } else {
            fork.kill();
        }
        fork.wait(PATIENCE, ForkState::is_end);
        let ended = fork.complete();
        assert!(
            matches!(&ended, Err(Error::ForkEnded { state: ended, .. }) if *ended == state),
            "{ended:?}"
        );
    }
}

#[test]
fn many_completions_at_once_beside_a_close_are_all_done() {
    for round in 0..4 {
        let fixture = Fixture::new();
        let forks: Vec<_> = (0..8).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
        let reads: Vec<_> = forks
            .iter()
            .map(|(_, vmm)| vmm.start(read_everything(round)).unwrap())
            .collect();
        std::thread::scope(|scope| {
            for (fork, _) in &forks {
                scope.spawn(|| fork.complete().unwrap());
            }
            scope.spawn(|| fixture.server.close(PATIENCE).unwrap());
        });
        reads.into_iter().for_each(assert_right);
        for (fork, vmm) in &forks {
            assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
            assert_reads_right(vmm, Read::default());
        }
    }
}

#[test]
fn a_close_that_loses_patience_does_not_take_back_what_was_asked_of_one_fork() {
    let (fixture, script, asked_fork, asked) = half_stuck();
    let (other_fork, other) = fixture.fork("other");
    asked_fork.complete().unwrap();
    let closed = fixture.server.close(Duration::from_millis(300));
    assert!(matches!(closed, Err(CloseError::NotComplete { .. })), "{closed:?}");
    script.open_gate();
    let status = asked_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    // Nobody wants that of the other any more: it is served, and not complete though it could be.
    assert_reads_right(&other, Read::default());
    let status = other_fork.status();
    assert_eq!(
        (status.state, status.reason.is_none()),
        (ForkState::Serving, true),
        "{status:?}"
    );
    other_fork.complete().unwrap();
    let status = other_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_lives_on(&asked);
    assert_lives_on(&other);
    fixture.server.close(PATIENCE).unwrap();
}

#[test]
fn of_two_that_close_the_impatient_one_does_not_end_the_other() {
    let (fixture, script, fork, vmm) = half_stuck();
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| fixture.server.close(PATIENCE));
        eventually("the close has come to what is stuck", || script.reads() > 0);
        let closed = fixture.server.close(Duration::from_millis(100));
        assert!(matches!(closed, Err(CloseError::NotComplete { .. })), "{closed:?}");
        assert!(!patient.is_finished());
        script.open_gate();
        patient.join().unwrap().unwrap();
    });
    assert_eq!(fork.status().state, ForkState::Complete);
    assert_lives_on(&vmm);
}

#[test]
fn a_completion_that_is_given_up_says_so_and_can_be_repeated() {
    let script = Script::new(&model(SIZE), |page| match page {
        1024.. => Access::Gated,
        _ => Access::Ready,
    });
    let (told, events) = mpsc::channel();
    let (fixture, script) = Fixture::scripted(script, |builder| {
        let deadlines = Deadlines {
            fault: Duration::from_millis(200),
            ..Deadlines::default()
        };
        builder.deadlines(deadlines).observer(move |event| {
            if let ForkEvent::NotCompleted { id, reason } = event {
                told.send((id, reason)).unwrap();
            }
        })
    });
    let (fork, vmm) = fixture.fork("a");
    for _ in 0..2 {
        fork.complete().unwrap();
        let (id, reason) = events.recv_timeout(PATIENCE).unwrap();
        assert_eq!((id.as_str(), reason.code()), ("a", "read_deadline"));
        let status = fork.status();
        assert_eq!(status.state, ForkState::Serving, "{status:?}");
        assert_eq!(status.reason.unwrap().code(), "read_deadline");
    }
    assert_reads_right(&vmm, read_range(0, 1024));
    script.open_gate();
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert!(status.reason.is_none(), "{status:?}");
    assert_lives_on(&vmm);
}

#[test]
fn a_vmm_that_registers_its_memory_again_is_served_on_with_a_reason_of_its_own() {
    let (told, events) = mpsc::channel();
    // Without zeros: those that were left to the kernel are lost to a VMM that registers them.
    let file = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let fixture = Fixture {
        template: Template::open(file.path()).unwrap(),
        file,
        ..Fixture::with(SIZE, |builder| {
            builder.observer(move |event| match event {
                ForkEvent::NotCompleted { reason, .. } => told.send(Some(reason)).unwrap(),
                ForkEvent::Ended(_) => told.send(None).unwrap(),
                _ => {}
            })
        })
    };
    // A fork is complete if its VMM was not quick enough.
    let refused = (0..100).find_map(|number| {
        let (fork, vmm) = fixture.fork(&format!("fork-{number}"));
        let registers = vmm.start(RegisterAgain).unwrap();
        fork.complete().unwrap();
        let reason = events.recv_timeout(PATIENCE).unwrap();
        vmm.run(EndRaces).unwrap();
        registers.join_within(PATIENCE).unwrap();
        reason.map(|reason| (fork, vmm, reason))
    });
    let (fork, vmm, reason) = refused.expect("no VMM was quick enough");
    assert_eq!(reason.code(), "registered_again");
    assert_eq!(fork.status().state, ForkState::Serving, "{:?}", fork.status());
    assert_reads_right(&vmm, Read::default());
}

#[test]
fn a_completion_that_finds_no_memory_tells_of_no_time_that_nobody_waited() {
    // The pool of hugepages is memory whose size a test can choose.
    let Some(_pages) = HugePages::reserve(SIZE >> 21).unwrap() else {
        return;
    };
    let (told, events) = mpsc::channel();
    let script = Script::new(&model(SIZE), |_| Access::Gated);
    let (fixture, script) = Fixture::scripted(script, |builder| {
        builder.observer(move |event| {
            if let ForkEvent::NotCompleted { reason, .. } = event {
                told.send(reason).unwrap();
            }
        })
    });
    let (fork, _vmm) = fixture.fork_with("a", |connect| Connect {
        page_size: PageSize::Huge,
        ..connect
    });
    fork.complete().unwrap();
    eventually("the completion reads", || script.reads() > 0);
    // The reservation gives the old size back.
    std::fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
    script.open_gate();
    let reason = events.recv_timeout(PATIENCE).unwrap();
    assert_eq!(reason.code(), "out_of_memory");
    assert_eq!(
        reason.to_string(),
        "no memory for a page (host, cgroup of the VMM, or hugepages)"
    );
}

#[test]
fn a_completion_that_would_exhaust_the_host_is_refused_and_others_are_not() {
    let fixture = Fixture::new();
    let (big_fork, big) = big_fork(&fixture, &too_big());
    let (small_fork, small) = fixture.fork("small");
    let started = Instant::now();
    let missing = not_enough(big_fork.complete());
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!((missing.forks, &*missing.place), (1, "on this host"));
    assert!(missing.needed > missing.available, "{missing:?}");
    small_fork.complete().unwrap();
    let status = small_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_lives_on(&small);
    assert_reads_right(&big, read_range(0, 1000));
    let status = big_fork.status();
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
    fixture.server.kill(PATIENCE).unwrap();
}

#[test]
fn room_that_one_completion_needs_is_not_given_to_another() {
    let Some(cgroup) = Cgroup::new().unwrap() else { return };
    let (fixture, script, first_fork, first) = half_stuck();
    let (second_fork, second) = fixture.fork("second");
    for vmm in [&first, &second] {
        assert_reads_right(vmm, read_range(0, 1024));
        cgroup.take(vmm.pid()).unwrap();
    }
    // Each needs 4 MiB more at most.
    let room = (7 << 20) * 16 / 15;
    cgroup.limit(cgroup.used().unwrap() + room).unwrap();
    first_fork.complete().unwrap();
    let missing = not_enough(second_fork.complete());
    assert_eq!((missing.forks, missing.needed), (2, 8 << 20), "{missing:?}");
    assert!(missing.place.contains(cgroup.path().to_str().unwrap()), "{missing:?}");
    script.open_gate();
    let status = first_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    cgroup.limit(64 << 20).unwrap();
    second_fork.complete().unwrap();
    let status = second_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_lives_on(&first);
    assert_lives_on(&second);
}

#[test]
fn zeros_are_looked_for_where_memory_is_short_without_them() {
    let Some(cgroup) = Cgroup::new().unwrap() else { return };
    let mut fixture = Fixture::new();
    // Zeros that were written: no file system tells of them.
    let all_zeros = TemplateModel {
        size: SIZE,
        seed: 1,
        layout: Layout {
            zero_every: NonZeroU64::new(1),
            holes: Vec::new(),
        },
    };
    fixture.file = TemplateFile::create(all_zeros).unwrap();
    fixture.template = Template::open(fixture.file.path()).unwrap();
    let (fork, vmm) = fixture.fork("a");
    cgroup.take(vmm.pid()).unwrap();
    cgroup.limit(5 << 20).unwrap();
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_reads_right(&vmm, Read::default());
}

#[test]
fn a_killed_fork_is_dead_and_nobody_else_notices() {
    let fixture = Fixture::new();
    let (going_fork, going) = fixture.fork("going");
    let (staying_fork, staying) = fixture.fork("staying");
    let reads = [&going, &staying].map(|vmm| vmm.start(read_everything(1)).unwrap());
    going_fork.kill();
    going_fork.kill();
    let status = going_fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(failed_with(&status), "killed");
    assert_eq!(going.wait().unwrap().signal(), Some(9));
    let [killed, right] = reads;
    assert!(killed.join_within(PATIENCE).is_err());
    assert_right(right);
    assert_eq!(staying_fork.status().state, ForkState::Serving);
    // It has ended, so there is nothing to do, nor once it is forgotten.
    going_fork.kill();
    going_fork.forget().unwrap();
    assert!(fixture.server.fork(going_fork.id()).is_none());
    going_fork.kill();
    assert_eq!(fixture.server.failures().get("killed"), Some(&1));
}

#[test]
fn killing_a_fork_without_a_vmm_closes_it() {
    let fixture = Fixture::new();
    let waiting = fixture.register("waiting");
    let shaking_hands = fixture.register("shaking-hands");
    let peer = SimVmm::spawn().unwrap();
    let begun = RawHandshake::new(shaking_hands.socket_path(), r#"[{"base_host_"#, &[FdKind::Uffd]);
    let _connection = peer.start(begun).unwrap();
    eventually("somebody connects", || held_uffds() == 1);
    for fork in [&waiting, &shaking_hands] {
        fork.kill();
        let status = fork.wait(PATIENCE, ForkState::is_end);
        assert_eq!(failed_with(&status), "closed");
        eventually("its socket is gone", || !fork.socket_path().exists());
    }
}

/// Killed at any moment of its handshake or completion, a fork ends once and the server goes on.
#[test]
fn a_fork_killed_at_any_moment_ends() {
    let fixture = Fixture::new();
    let mut random = fastrand::Rng::with_seed(1);
    for round in 0..40 {
        let fork = fixture.register(&format!("fork-{round}"));
        let vmm = SimVmm::spawn().unwrap();
        let connect = pagecast_testkit::sim_vmm::Connect::new(fork.socket_path(), fixture.file.model());
        let connected = vmm.start(connect).unwrap();
        if round % 2 == 0 {
            connected.join_within(PATIENCE).unwrap();
            fork.wait(PATIENCE, |state| state != ForkState::Waiting);
            fork.complete().unwrap();
        }
        // Not to wait for anything, but to be anywhere in it.
        std::thread::sleep(Duration::from_micros(random.u64(0..3000)));
        fork.kill();
        let status = fork.wait(PATIENCE, ForkState::is_end);
        match status.state {
            ForkState::Complete => assert_reads_right(&vmm, Read::default()),
            ForkState::Failed => {
                let code = failed_with(&status);
                assert!(["killed", "closed"].contains(&code), "{code}");
                assert!(code != "killed" || vmm.wait().unwrap().signal() == Some(9));
            }
            other => panic!("{other}"),
        }
    }
    let (_, late) = fixture.fork("late");
    assert_reads_right(&late, Read::default());
}

#[test]
fn a_fork_killed_while_the_server_closes_does_not_hold_it_up() {
    let (fixture, script, stuck_fork, stuck) = half_stuck();
    std::thread::scope(|scope| {
        let close = scope.spawn(|| fixture.server.close(PATIENCE));
        eventually("the close has come to what is stuck", || script.reads() > 0);
        stuck_fork.kill();
        close.join().unwrap().unwrap();
    });
    assert_eq!(failed_with(&stuck_fork.status()), "killed");
    assert_eq!(stuck.wait().unwrap().signal(), Some(9));
}
