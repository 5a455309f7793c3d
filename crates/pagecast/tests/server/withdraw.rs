//! A template that is withdrawn: its forks end, nobody reads it any more, and nobody else notices.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pagecast::Template;
use pagecast::server::{Error, Fork, ForkOptions, ForkState};
use pagecast::template::SourceError;
use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::sim_vmm::{AwaitClose, Connect, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use crate::fixture::{
    Fixture, PATIENCE, assert_lives_on, assert_reads_right, eventually, failed_with, held_uffds, model,
    read_everything, read_range,
};
use crate::scripted_source::{Access, Script, ScriptedSource};
use crate::vmm_process::{self, in_page_fault};

const HOW: &str = "somebody is about to write it";

/// Ended for the reason that was given.
fn assert_withdrawn(fork: &Fork) {
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(failed_with(&status), "template_changed");
    let text = pagecast::server::chain(&**status.reason.as_ref().unwrap());
    assert!(text.contains(HOW), "{text}");
}

fn assert_refused<T>(result: Result<T, Error>) {
    match result {
        Err(Error::Template(SourceError::Changed { how })) => assert_eq!(how, HOW),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("a withdrawn template was forked"),
    }
}

#[test]
fn all_forks_of_a_withdrawn_template_end_and_those_of_others_are_served() {
    let mut fixture = Fixture::new();
    let waiting = fixture.register("waiting");
    let shaking_hands = fixture.register("shaking-hands");
    let peer = SimVmm::spawn().unwrap();
    let begun = RawHandshake::new(shaking_hands.socket_path(), r#"[{"base_host_"#, &[FdKind::Uffd]);
    let _connection = peer.start(begun).unwrap();
    eventually("somebody connects", || held_uffds() == 1);
    let (done_fork, done) = fixture.fork("complete");
    done_fork.complete().unwrap();
    done_fork.wait(PATIENCE, ForkState::is_end);
    let (idle_fork, idle) = fixture.fork("idle");
    let (busy_fork, busy) = fixture.fork("busy");
    let (stopped_fork, stopped) = fixture.fork("stopped");
    vmm_process::stop(&stopped);
    let read = busy.start(read_everything(1)).unwrap();
    eventually("faults", || busy_fork.status().stats.faults.demand > 100);
    let any = ForkOptions::new(fixture.folder.path().join("any"));
    fixture
        .server
        .listen(&"any".parse().unwrap(), &fixture.template, &any)
        .unwrap();
    // Another template: the same bytes in another file.
    let withdrawn = fixture.template.clone();
    let other_file = TemplateFile::create(model(8 << 20)).unwrap();
    fixture.template = Template::open(other_file.path()).unwrap();
    let (other_fork, other) = fixture.fork("other");
    let other_read = other.start(read_everything(2)).unwrap();

    assert_eq!(fixture.server.withdraw(&withdrawn, HOW), 5);
    assert!(fixture.server.wait_withdrawn(&withdrawn, PATIENCE));
    for fork in [&waiting, &shaking_hands, &idle_fork, &busy_fork, &stopped_fork] {
        assert!(fork.status().state.is_end(), "{:?}", fork.status());
        assert_withdrawn(fork);
        eventually("its socket is gone", || !fork.socket_path().exists());
    }
    assert_eq!(fixture.server.withdraw(&withdrawn, "for another reason"), 0);
    for vmm in [&idle, &busy, &stopped] {
        assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    }
    // It may have had all its pages by then.
    let _ = read.join_within(PATIENCE);
    // Now it may be written: whoever lives does not read it.
    let file = File::options().write(true).open(fixture.file.path()).unwrap();
    file.write_all_at(&vec![0xEE; 8 << 20], 0).unwrap();
    assert_lives_on(&done);
    assert_eq!(other_read.join_within(PATIENCE).unwrap().checked.mismatches, 0);
    assert_lives_on(&other);
    assert_eq!(other_fork.status().state, ForkState::Serving);

    // Nobody can fork it any more, neither way, nor where somebody listened already.
    let late = ForkOptions::new(fixture.folder.path().join("late"));
    assert_refused(fixture.server.register("late".parse().unwrap(), &withdrawn, &late));
    assert_refused(fixture.server.listen(&"late".parse().unwrap(), &withdrawn, &late));
    assert!(fixture.server.fork(&"late".parse().unwrap()).is_none());
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fixture.folder.path().join("any"), fixture.file.model()))
        .unwrap();
    let closed = vmm.run(AwaitClose { within_ms: 10_000 }).unwrap();
    assert!(closed.after_us.is_some(), "it was let in");
    fixture.server.close(PATIENCE).unwrap();
}

/// Reads that are under way have to end first; those that are not are not begun.
#[test]
fn nothing_of_a_withdrawn_template_is_read_once_it_is_given_free() {
    const FAULTS: u64 = 16;
    let script = Script::new(&model(8 << 20), |page| match page {
        1024.. => Access::Gated,
        _ => Access::Ready,
    });
    let (fixture, script) = Fixture::scripted(script, |builder| builder);
    let (fork, vmm) = fixture.fork("a");
    let (_, second) = fixture.fork("second");
    assert_reads_right(&second, read_range(0, 100));
    let reads: Vec<_> = (0..FAULTS)
        .map(|n| vmm.start(read_range(1100 + n, 1101 + n)).unwrap())
        .collect();
    let vcpus = usize::try_from(FAULTS).unwrap();
    eventually("faults", || in_page_fault(&vmm) == vcpus);
    eventually("slow reads", || {
        fork.status().stats.faults.slow == FAULTS && script.reads() > 0
    });
    assert_eq!(fixture.server.withdraw(&fixture.template, HOW), 2);
    assert_withdrawn(&fork);
    assert!(
        !fixture
            .server
            .wait_withdrawn(&fixture.template, Duration::from_millis(100)),
        "reads are under way"
    );
    script.open_gate();
    assert!(fixture.server.wait_withdrawn(&fixture.template, PATIENCE));
    let accesses = script.accesses();
    assert!(reads.into_iter().all(|read| read.join_within(PATIENCE).is_err()));
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(script.accesses(), accesses, "read after it was given free");
    assert!(script.reads() < FAULTS, "reads that had not begun were not given up");
}

#[test]
fn a_search_for_zeros_ends_when_its_template_is_withdrawn() {
    let fixture = Fixture::new();
    // More than the host has, so a completion looks for zeros; each step of that search takes until the gate is open.
    let big = crate::fixture::too_big();
    let mut script = Script::new(&big, |_| Access::Ready);
    script.zeros_gated = true;
    let script = Arc::new(script);
    let template = Template::from_source(Arc::new(ScriptedSource(Arc::clone(&script))));
    let options = ForkOptions::new(fixture.folder.path().join("big"));
    let id = "big".parse().unwrap();
    let fork = fixture.server.register(id, &template, &options).unwrap();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fork.socket_path(), &big)).unwrap();
    fork.wait(PATIENCE, |state| state == ForkState::Serving);
    let refused = fork.complete();
    assert!(matches!(refused, Err(Error::NotEnoughMemory(_))), "{refused:?}");
    assert_eq!(fixture.server.withdraw(&template, HOW), 1);
    assert!(!fixture.server.wait_withdrawn(&template, Duration::from_millis(100)));
    script.open_gate();
    assert!(fixture.server.wait_withdrawn(&template, PATIENCE));
    assert_withdrawn(&fork);
}

/// Forks that come while their template is withdrawn: each is refused or ended, and none is served.
#[test]
fn no_fork_slips_through_while_its_template_is_withdrawn() {
    for round in 0..10 {
        let file = TemplateFile::create(TemplateModel::of_data(1 << 20, 1)).unwrap();
        let mut fixture = Fixture::new();
        fixture.template = Template::open(file.path()).unwrap();
        let vmms: Vec<_> = (0..6).map(|_| SimVmm::spawn().unwrap()).collect();
        let enough = AtomicBool::new(false);
        let forks = std::thread::scope(|scope| {
            let registering = scope.spawn(|| {
                let mut forks = Vec::new();
                for (n, vmm) in vmms.iter().enumerate() {
                    let options = ForkOptions::new(fixture.folder.path().join(n.to_string()));
                    let id = format!("fork-{n}").parse().unwrap();
                    match fixture.server.register(id, &fixture.template, &options) {
                        Ok(fork) => {
                            drop(vmm.start(Connect::new(fork.socket_path(), file.model())).unwrap());
                            forks.push(fork);
                        }
                        Err(error) => assert!(matches!(error, Error::Template(_)), "{error:?}"),
                    }
                    enough.store(n >= round % 6, Ordering::Relaxed);
                }
                forks
            });
            while !enough.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            fixture.server.withdraw(&fixture.template, HOW);
            assert!(fixture.server.wait_withdrawn(&fixture.template, PATIENCE));
            registering.join().unwrap()
        });
        assert!(!forks.is_empty());
        for fork in forks {
            let status = fork.wait(PATIENCE, ForkState::is_end);
            assert_eq!(failed_with(&status), "template_changed");
        }
        assert_eq!(fixture.server.withdraw(&fixture.template, HOW), 0);
    }
}

/// Forks that are refused are to be seen for a moment: whoever waits for the end of all forks does not wait for theirs.
#[test]
fn nobody_waits_for_forks_that_were_refused() {
    let fixture = Fixture::new();
    fixture.server.withdraw(&fixture.template, HOW);
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let options = ForkOptions::new(fixture.folder.path().join("refused"));
            while !enough.load(Ordering::Relaxed) {
                assert_refused(
                    fixture
                        .server
                        .register("refused".parse().unwrap(), &fixture.template, &options),
                );
            }
        });
        let all_in_time = (0..20_000).all(|_| fixture.server.wait_withdrawn(&fixture.template, PATIENCE));
        enough.store(true, Ordering::Relaxed);
        assert!(all_in_time);
    });
}

#[test]
fn a_template_can_be_withdrawn_while_its_forks_are_completed() {
    let (fixture, script, fork, vmm) = crate::fixture::half_stuck();
    fork.complete().unwrap();
    eventually("the completion has come to what is stuck", || script.reads() > 0);
    assert_eq!(fixture.server.withdraw(&fixture.template, HOW), 1);
    assert_withdrawn(&fork);
    assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    script.open_gate();
    assert!(fixture.server.wait_withdrawn(&fixture.template, PATIENCE));
}

/// Whether there is room to complete forks takes a look at every page, and the kernel gives a writer only so much time.
#[test]
fn a_template_is_vacated_with_one_look_at_the_pages_of_each_fork_and_with_none_where_there_is_no_time() {
    const FORKS: u64 = 6;
    for patience in [Duration::ZERO, Duration::from_secs(1)] {
        let script = Script::new(&model(8 << 20), |page| match page {
            1024.. => Access::Gated,
            _ => Access::Ready,
        });
        let (fixture, script) = Fixture::scripted(script, |builder| builder);
        let forks: Vec<_> = (0..FORKS).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
        // Looks at zeros when it comes to its worker, which is over once that has answered a fault.
        for (_, vmm) in &forks {
            assert_reads_right(vmm, read_range(0, 1));
        }
        let before = script.zero_looks();
        fixture.server.vacate(&fixture.template, HOW, patience);
        let looks = script.zero_looks() - before;
        let most = if patience.is_zero() { 0 } else { FORKS };
        assert!(looks <= most, "{looks} looks with a patience of {patience:?}");
        for (fork, _vmm) in &forks {
            assert_withdrawn(fork);
        }
        script.open_gate();
    }
}
