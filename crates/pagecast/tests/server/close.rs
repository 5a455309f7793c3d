//! Closing a server hurts no VMM: all have all their memory first, or go on being served.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecast::Template;
use pagecast::server::{CloseError, Error, ForkOptions, ForkState, Server};
use pagecast_testkit::cgroup::Cgroup;
use pagecast_testkit::sim_vmm::{Connect, EndRaces, Job, Order, Pages, Read, Remove, RemoveRace, SimVmm, Touch};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use rustix::process::{Pid, Signal};

use crate::fixture::{
    Fixture, PATIENCE, assert_lives_on, assert_reads_right, assert_right, big_fork, eventually, half_stuck, model,
    read_everything, read_range, too_big,
};
use crate::scripted_source::{Access, Script, ScriptedSource};
use crate::vmm_process::{self, in_page_fault, in_removal};

/// Set for the process that is the server of a test: the folder where it finds its template and makes its sockets.
const SERVE_IN: &str = "PAGECAST_TEST_SERVE_IN";
const FORKS: usize = 20;
const SIZE: u64 = 8 << 20;
/// In milliseconds; longer than a test takes, which ends its races itself.
const LONG_RACE: u64 = 60_000;

fn not_complete(result: Result<(), CloseError>) -> Vec<String> {
    match result {
        Err(CloseError::NotComplete { forks }) => forks.iter().map(ToString::to_string).collect(),
        other => panic!("closed in spite of all: {other:?}"),
    }
}

#[test]
fn vmms_closed_while_they_fault_read_right_after_the_server_process_is_gone() {
    let this_test = "close::vmms_closed_while_they_fault_read_right_after_the_server_process_is_gone";
    if let Some(folder) = std::env::var_os(SERVE_IN) {
        serve_until_told(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let file = TemplateFile::create_at(&folder.path().join("mem"), model(SIZE)).unwrap();
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", this_test, "--nocapture"])
        .env(SERVE_IN, folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("ready")));

    let vmms: Vec<_> = (0..FORKS)
        .map(|n| {
            let vmm = SimVmm::spawn().unwrap();
            vmm.run(Connect::new(folder.path().join(n.to_string()), file.model()))
                .unwrap();
            vmm
        })
        .collect();
    // The last few touch nothing while there is a server.
    let busy = vmms.iter().zip(0..).take(FORKS - 4);
    let reads: Vec<_> = busy
        .map(|(vmm, seed)| vmm.start(read_everything(seed)).unwrap())
        .collect();
    eventually("faults", || {
        vmms.iter().any(|vmm| in_page_fault(vmm) > 0) || reads.iter().any(Job::is_done)
    });
    writeln!(server.stdin.take().unwrap(), "close").unwrap();
    let status = server.wait().unwrap();
    assert!(status.success(), "{status}: {:?}", said.collect::<Vec<_>>());

    reads.into_iter().for_each(assert_right);
    vmms.iter().for_each(assert_lives_on);
    file.check_untouched().unwrap();
}

/// What the process does that the test above starts. It says when its forks are registered, and leaves when told to, or
/// when its test has gone.
fn serve_until_told(folder: &Path) -> ! {
    let template = Template::open(&folder.join("mem")).unwrap();
    let server = Server::builder().workers(2).start().unwrap();
    for n in 0..FORKS {
        let options = ForkOptions::new(folder.join(n.to_string()));
        let id = format!("fork-{n}").parse().unwrap();
        server.register(id, &template, &options).unwrap();
    }
    println!("\nready");
    std::io::stdin().read_line(&mut String::new()).unwrap();
    let closed = server.close(PATIENCE);
    println!("{closed:?}: {:#?}", server.forks());
    std::process::exit(i32::from(closed.is_err()));
}

#[test]
fn closing_twenty_forks_that_fault_completes_all_and_frees_what_they_held() {
    let fixture = Fixture::new();
    let waiting = fixture.register("waiting");
    let forks: Vec<_> = (0..FORKS).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
    let reads: Vec<_> = forks
        .iter()
        .zip(0..)
        .map(|((_, vmm), seed)| vmm.start(read_everything(seed)).unwrap())
        .collect();
    eventually("faults", || {
        forks.iter().any(|(fork, _)| fork.status().stats.faults.demand > 0)
    });
    fixture.server.close(PATIENCE).unwrap();
    reads.into_iter().for_each(assert_right);
    for (fork, vmm) in &forks {
        assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
        assert_lives_on(vmm);
    }
    let status = waiting.status();
    assert_eq!(
        status.reason.as_ref().map(|reason| reason.code()),
        Some("closed"),
        "{status:?}"
    );
    assert_eq!(
        std::fs::read_dir(fixture.folder.path()).unwrap().count(),
        0,
        "socket files"
    );
    let options = ForkOptions::new(fixture.folder.path().join("late"));
    let late = fixture
        .server
        .register("late".parse().unwrap(), &fixture.template, &options);
    assert!(matches!(late, Err(Error::Closed)), "{late:?}");
    fixture.file.check_untouched().unwrap();
}

#[test]
fn closing_twice_and_from_two_threads_at_once_is_closing_once() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    let read = vmm.start(read_everything(1)).unwrap();
    std::thread::scope(|scope| {
        let closers: Vec<_> = (0..2).map(|_| scope.spawn(|| fixture.server.close(PATIENCE))).collect();
        for closer in closers {
            closer.join().unwrap().unwrap();
        }
    });
    fixture.server.close(Duration::ZERO).unwrap();
    fixture.server.kill(Duration::ZERO).unwrap();
    assert_eq!(fork.status().state, ForkState::Complete);
    assert_right(read);
    assert_lives_on(&vmm);
}

#[test]
fn removed_pages_and_zero_pages_are_zeros_after_the_close() {
    let fixture = Fixture::new();
    let (_, vmm) = fixture.fork("a");
    // Touched or not, removed or not, data and zeros: all there is.
    assert_reads_right(&vmm, read_range(0, 600));
    vmm.run(Remove {
        ranges: vec![50..150, 500..700, 1000..1100],
    })
    .unwrap();
    assert_reads_right(&vmm, read_range(550, 650));
    fixture.server.close(PATIENCE).unwrap();
    assert_lives_on(&vmm);
}

#[test]
fn closing_while_memory_is_given_back_leaves_nobody_behind() {
    for seed in 0..4 {
        let fixture = Fixture::new();
        let forks: Vec<_> = (0..3).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
        let race = RemoveRace {
            millis: LONG_RACE,
            threads: 2,
            seed,
        };
        let races: Vec<_> = forks.iter().map(|(_, vmm)| vmm.start(race).unwrap()).collect();
        eventually("removals", || {
            forks.iter().all(|(fork, _)| fork.status().stats.faults.removed > 100)
        });
        fixture.server.close(PATIENCE).unwrap();
        assert!(races.iter().all(|race| !race.is_done()), "nothing raced with the close");
        for ((_, vmm), race) in forks.iter().zip(races) {
            vmm.run(EndRaces).unwrap();
            let report = race.join_within(PATIENCE).unwrap();
            assert_eq!(report.checked.mismatches, 0, "{report:?}");
        }
        for (_, vmm) in &forks {
            assert_lives_on(vmm);
        }
    }
}

#[test]
fn a_stopped_vmm_holds_up_no_close_and_goes_on_right() {
    let fixture = Fixture::new();
    let (reading_fork, reading) = fixture.fork("reading");
    let (racing_fork, racing) = fixture.fork("racing");
    let read = reading.start(read_everything(1)).unwrap();
    let race = racing
        .start(RemoveRace {
            millis: LONG_RACE,
            threads: 2,
            seed: 1,
        })
        .unwrap();
    eventually("faults and removals", || {
        reading_fork.status().stats.faults.demand > 0 && racing_fork.status().stats.faults.removed > 0
    });
    vmm_process::stop(&reading);
    vmm_process::stop(&racing);
    let patience = Duration::from_secs(5);
    let started = Instant::now();
    let closed = fixture.server.close(patience);
    assert!(started.elapsed() < patience + Duration::from_secs(5), "hung");
    vmm_process::resume(&reading);
    vmm_process::resume(&racing);
    // What the kernel lets a server do to a stopped process is enough to complete it, as a rule.
    if let Err(error) = closed {
        assert!(matches!(error, CloseError::NotComplete { .. }), "{error}");
        fixture.server.close(PATIENCE).unwrap();
    }
    assert_right(read);
    racing.run(EndRaces).unwrap();
    let report = race.join_within(PATIENCE).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
    assert_lives_on(&reading);
    assert_lives_on(&racing);
}

#[test]
fn a_close_that_takes_too_long_says_so_and_serves_on_and_can_be_repeated() {
    let (fixture, script, fork, vmm) = half_stuck();
    let started = Instant::now();
    let forks = not_complete(fixture.server.close(Duration::from_millis(300)));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(forks, ["a"]);
    assert_eq!(fork.status().state, ForkState::Serving, "{:?}", fork.status());
    let options = ForkOptions::new(fixture.folder.path().join("late"));
    let late = fixture
        .server
        .register("late".parse().unwrap(), &fixture.template, &options);
    assert!(matches!(late, Err(Error::Closed)), "{late:?}");

    // Served as before: what can be had, and then what could not.
    vmm.run(Remove::range(400..500)).unwrap();
    assert_reads_right(&vmm, read_range(0, 1024));
    let read = vmm.start(read_range(1500, 1600)).unwrap();
    eventually("a fault", || in_page_fault(&vmm) == 1);
    script.open_gate();
    assert_right(read);
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(fork.status().state, ForkState::Complete);
    assert_lives_on(&vmm);
}

/// The bytes that the first close asked for come while the second is at work elsewhere.
#[test]
fn bytes_for_a_close_that_was_given_up_do_not_end_up_in_other_pages() {
    let (fixture, script, fork, vmm) = half_stuck();
    not_complete(fixture.server.close(Duration::from_millis(200)));
    std::thread::scope(|scope| {
        let again = scope.spawn(|| fixture.server.close(PATIENCE));
        // Until the second close has come to what is stuck; where it waits for the first one's bytes, until it does.
        let until = Instant::now() + Duration::from_millis(500);
        while script.reads() < 2 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        script.open_gate();
        again.join().unwrap().unwrap();
    });
    assert_eq!(fork.status().state, ForkState::Complete);
    assert_reads_right(&vmm, Read::default());
}

/// Nobody waits for the pages that a close reads, so nobody has to die because they do not come.
#[test]
fn a_close_that_cannot_read_the_template_kills_no_vmm_that_does_not_need_it() {
    let script = Script::new(&model(SIZE), |page| match page {
        1024.. => Access::Gated,
        _ => Access::Ready,
    });
    let fault = Duration::from_millis(300);
    let (fixture, script) = Fixture::scripted(script, |builder| {
        builder.workers(1).deadlines(pagecast::server::Deadlines {
            fault,
            ..Default::default()
        })
    });
    let (fork, vmm) = fixture.fork("a");
    not_complete(fixture.server.close(Duration::from_millis(100)));
    // Given up before the deadline and after it.
    not_complete(fixture.server.close(Duration::from_secs(2)));
    let status = fork.wait(fault * 2, ForkState::is_end);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
    let reason = status.reason.map(|reason| reason.code());
    assert_eq!(reason, Some("read_deadline"), "why it could not be completed");
    assert_reads_right(&vmm, read_range(0, 1024));
    script.open_gate();
    fixture.server.close(PATIENCE).unwrap();
    assert_lives_on(&vmm);
}

/// Between the end of its address space and the end of the process, a large VMM takes a while: it must not look like
/// one that cannot be completed.
#[test]
fn a_vmm_that_is_just_dying_does_not_spoil_the_close() {
    let big = TemplateModel::of_data(128 << 20, 1);
    for _ in 0..2 {
        let fixture = Fixture::new();
        let (dying_fork, dying) = big_fork(&fixture, &big);
        let (_, other) = fixture.fork("other");
        dying
            .run(Touch {
                pages: Pages::ALL,
                threads: 2,
                order: Order::Sequential,
            })
            .unwrap();
        let pid = Pid::from_raw(dying.pid().try_into().unwrap()).unwrap();
        let statm = format!("/proc/{}/statm", dying.pid());
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        // No sleep, or it would be over.
        while !std::fs::read_to_string(&statm).is_ok_and(|statm| statm.starts_with("0 ")) {}
        fixture.server.close(PATIENCE).unwrap();
        assert!(dying_fork.status().state.is_end(), "{:?}", dying_fork.status());
        assert_lives_on(&other);
    }
}

fn place(result: Result<(), CloseError>) -> String {
    match result {
        Err(CloseError::NotEnoughMemory(missing)) => {
            assert!(missing.forks > 0 && missing.needed > missing.available, "{missing:?}");
            missing.place
        }
        other => panic!("closed in spite of all: {other:?}"),
    }
}

#[test]
fn a_close_that_would_exhaust_the_host_is_refused_and_nothing_changes() {
    let fixture = Fixture::new();
    let (big_fork, big) = big_fork(&fixture, &too_big());
    let (small_fork, small) = fixture.fork("small");
    // Short, for a server that would try it all the same.
    let patience = Duration::from_secs(1);
    assert_eq!(place(fixture.server.close(patience)), "on this host");
    assert_eq!(place(fixture.server.close(patience)), "on this host");
    for (fork, vmm) in [(&big_fork, &big), (&small_fork, &small)] {
        assert_reads_right(vmm, read_range(0, 1000));
        assert_eq!(fork.status().state, ForkState::Serving, "{:?}", fork.status());
    }
    let (_, late) = fixture.fork("late");
    assert_reads_right(&late, Read::default());

    fixture.server.kill(PATIENCE).unwrap();
    for vmm in [&big, &small, &late] {
        assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    }
    assert_eq!(fixture.server.failures(), BTreeMap::from([("killed", 3)]));
}

#[test]
fn a_close_that_would_exhaust_the_cgroup_of_a_vmm_is_refused_until_there_is_room() {
    let Some(cgroup) = Cgroup::new().unwrap() else { return };
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    cgroup.take(vmm.pid()).unwrap();
    cgroup.limit(5 << 20).unwrap();
    let refused = place(fixture.server.close(PATIENCE));
    assert!(refused.contains(cgroup.path().to_str().unwrap()), "{refused}");
    assert_reads_right(&vmm, read_range(0, 200));
    assert_eq!(fork.status().state, ForkState::Serving, "{:?}", fork.status());
    cgroup.limit(64 << 20).unwrap();
    fixture.server.close(PATIENCE).unwrap();
    assert_lives_on(&vmm);
}

#[test]
fn a_close_does_not_wait_for_a_template_that_hangs_while_zeros_are_looked_for() {
    let fixture = Fixture::new();
    let model = too_big();
    let mut script = Script::new(&model, |_| Access::Ready);
    script.zeros_gated = true;
    let script = Arc::new(script);
    let template = Template::from_source(Arc::new(ScriptedSource(Arc::clone(&script))));
    let options = ForkOptions::new(fixture.folder.path().join("big"));
    let fork = fixture
        .server
        .register("big".parse().unwrap(), &template, &options)
        .unwrap();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fork.socket_path(), &model)).unwrap();
    fork.wait(PATIENCE, |state| state == ForkState::Serving);
    // Where it does wait, let it go in the end, so that the test fails rather than hangs.
    let rescue = Arc::clone(&script);
    std::thread::spawn(move || {
        std::thread::sleep(PATIENCE);
        rescue.open_gate();
    });
    let started = Instant::now();
    assert_eq!(place(fixture.server.close(Duration::from_millis(500))), "on this host");
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    assert_reads_right(&vmm, read_range(0, 100));
    fixture.server.kill(PATIENCE).unwrap();
}

#[test]
fn kill_leaves_no_vmm_and_says_so() {
    let fixture = Fixture::new();
    let waiting = fixture.register("waiting");
    let forks: Vec<_> = (0..4).map(|n| fixture.fork(&format!("fork-{n}"))).collect();
    let reads: Vec<_> = forks
        .iter()
        .map(|(_, vmm)| vmm.start(read_everything(1)).unwrap())
        .collect();
    vmm_process::stop(&forks[0].1);
    fixture.server.kill(PATIENCE).unwrap();
    for (fork, vmm) in &forks {
        assert_eq!(vmm.wait().unwrap().signal(), Some(9));
        let status = fork.status();
        assert_eq!(status.state, ForkState::Failed, "{status:?}");
        assert_eq!(status.reason.unwrap().code(), "killed");
    }
    assert!(reads.into_iter().all(|read| read.join().is_err()));
    assert_eq!(waiting.status().reason.unwrap().code(), "closed");
    assert_eq!(
        fixture.server.failures(),
        BTreeMap::from([("closed", 1), ("killed", 4)])
    );
    fixture.server.kill(PATIENCE).unwrap();
    fixture.server.close(PATIENCE).unwrap();
}

#[test]
fn dropping_a_server_completes_its_forks() {
    let fixture = Fixture::new();
    let (fork, vmm) = fixture.fork("a");
    let read = vmm.start(read_everything(1)).unwrap();
    let Fixture { server, .. } = fixture;
    drop(server);
    assert_eq!(fork.status().state, ForkState::Complete, "{:?}", fork.status());
    assert_right(read);
    assert_lives_on(&vmm);
}

/// A thread that gives memory back waits until its event is read. Here it begins to wait when all of its fork is
/// installed, and the one worker there is looks after another fork: the next that this worker does is to unregister.
#[test]
fn a_removal_that_begins_right_before_its_fork_is_let_go_ends() {
    const LAST: u64 = SIZE / 4096 - 1;
    let going_script = Script::new(&model(SIZE), |page| match page {
        LAST => Access::HoldsWorker,
        _ => Access::Ready,
    });
    let (mut fixture, going_script) = Fixture::scripted(going_script, |builder| builder.workers(1));
    let (going_fork, going) = fixture.fork("going");
    // It has no more to install for now, so it is never its turn.
    let other_script = Arc::new(Script::new(&model(SIZE), |page| match page {
        // Far from what is tried to be installed first.
        1500 => Access::HoldsWorker,
        _ => Access::Gated,
    }));
    fixture.template = Template::from_source(Arc::new(ScriptedSource(Arc::clone(&other_script))));
    let (_, other) = fixture.fork("other");

    std::thread::scope(|scope| {
        let close = scope.spawn(|| fixture.server.close(PATIENCE));
        eventually("the last page is read", || going_script.holds() == 1);
        let read = other.start(read_range(1500, 1501)).unwrap();
        eventually("a fault", || in_page_fault(&other) == 1);
        going_script.open_gate();
        eventually("the worker is held", || other_script.holds() == 1);
        let removal = going.start(Remove::range(10..20)).unwrap();
        eventually("a removal", || in_removal(&going) == 1);
        other_script.open_gate();
        removal.join_within(PATIENCE).unwrap();
        assert_right(read);
        close.join().unwrap().unwrap();
    });
    assert_eq!(going_fork.status().state, ForkState::Complete);
    assert_lives_on(&going);
    assert_lives_on(&other);
}
