//! How forks begin and end: what a VMM leaves when it goes, and what it cannot do to others on its way in.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Barrier, Mutex};
use std::time::Duration;

use pagecast::server::{Builder, Deadlines, Error, Fork, ForkEvent, ForkId, ForkOptions, ForkState, ForkStatus};
use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::sim_vmm::{Connect, Pages, Read, SimVmm};
use pagecast_testkit::template_file::Expected;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::fixture::{
    Fixture, PATIENCE, asked_or_given_back, assert_open, cpu_time_over, eventually, failed_with, fds_at_rest,
    held_uffds, known_peers, open_fds, short_deadlines,
};

/// Longer than any test: a deadline that plays no part.
const NEVER: Duration = Duration::from_hours(1);

/// A template in which reading everything does not take long.
const SIZE: u64 = 1 << 20;

fn small(set_up: impl FnOnce(Builder) -> Builder) -> Fixture {
    Fixture::with(SIZE, set_up)
}

fn id(name: &str) -> ForkId {
    name.parse().unwrap()
}

fn check_reads_right(vmm: &SimVmm) {
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

fn connect(fixture: &Fixture, fork: &Fork) -> SimVmm {
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fork.socket_path(), fixture.file.model())).unwrap();
    vmm
}

fn wait_serving(fork: &Fork) {
    let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
}

fn wait_ended(fork: &Fork, wanted: ForkState) -> ForkStatus {
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, wanted, "{status:?}");
    status
}

// VMMs end: LESSONS 12 and 13.

/// A VMM that has read its memory and then ends like this leaves nothing but its numbers.
fn leaves_nothing_when(end: impl FnOnce(&SimVmm)) {
    let fixture = small(|builder| builder);
    let vmm = SimVmm::spawn().unwrap();
    let before = open_fds();
    let fork = fixture.register("fork");
    vmm.run(Connect::new(fork.socket_path(), fixture.file.model())).unwrap();
    wait_serving(&fork);
    check_reads_right(&vmm);
    end(&vmm);
    let ended = wait_ended(&fork, ForkState::Exited);
    assert!(ended.reason.is_none(), "nothing went wrong: {ended:?}");
    let model = fixture.file.model();
    let of_data = |offset: &u64| matches!(model.expected(*offset), Expected::Pattern(_));
    let data_pages = (0..SIZE).step_by(4096).filter(of_data).count();
    assert_eq!(ended.stats.installed_bytes, data_pages as u64 * 4096, "{ended:?}");
    assert!(asked_or_given_back(&ended) >= SIZE / 4096, "{ended:?}");
    assert_eq!(ended.pid, i32::try_from(vmm.pid()).ok());
    assert_open(&before);
    eventually("its socket is gone", || !fork.socket_path().exists());
    assert!(fixture.server.failures().is_empty());
    let known: Vec<_> = fixture.server.forks().iter().map(|fork| fork.status().state).collect();
    assert_eq!(known, [ForkState::Exited], "known until it is unregistered");
    fork.forget().unwrap();
    assert_eq!(fork.status().stats, ended.stats, "its numbers stay");
}

#[test]
fn a_vmm_that_exits_leaves_nothing_but_its_numbers() {
    leaves_nothing_when(|vmm| assert!(vmm.exit(0).unwrap().success()));
}

#[test]
fn a_vmm_that_aborts_leaves_nothing_but_its_numbers() {
    leaves_nothing_when(|vmm| assert!(!vmm.abort().unwrap().success()));
}

#[test]
fn a_vmm_that_is_killed_leaves_nothing_but_its_numbers() {
    leaves_nothing_when(|vmm| assert!(!vmm.kill().unwrap().success()));
}

#[test]
fn a_vmm_that_closes_its_socket_at_once_is_served_for_life() {
    let fixture = small(|builder| builder);
    let before = open_fds();
    let fork = fixture.register("fork");
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect {
        keep_socket: false,
        ..Connect::new(fork.socket_path(), fixture.file.model())
    };
    vmm.run(connect).unwrap();
    wait_serving(&fork);
    // The server has noticed, and lets go of its end.
    let sockets = |fds: &std::collections::BTreeMap<String, usize>| fds.get("socket").copied();
    eventually("the socket is closed", || sockets(&open_fds()) == sockets(&before));
    check_reads_right(&vmm);
    assert_eq!(fork.status().state, ForkState::Serving);
    vmm.kill().unwrap();
    wait_ended(&fork, ForkState::Exited);
}

#[test]
fn a_vmm_without_a_uffd_of_its_own_is_served_completed_and_right() {
    let fixture = small(|builder| builder);
    let fork = fixture.register("fork");
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect {
        keep_uffd: false,
        ..Connect::new(fork.socket_path(), fixture.file.model())
    };
    vmm.run(connect).unwrap();
    let half = Read {
        pages: Pages::range(0..128),
        ..Read::default()
    };
    assert_eq!(vmm.run(half).unwrap().checked.mismatches, 0);
    // The server's copy is the last one: closed before all is there, the rest would read as zeros.
    fixture.server.close(PATIENCE).unwrap();
    wait_ended(&fork, ForkState::Complete);
    check_reads_right(&vmm);
}

#[test]
fn a_vmm_without_a_uffd_and_without_a_socket_is_noticed_when_it_dies() {
    let fixture = small(|builder| builder);
    let fork = fixture.register("fork");
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect {
        keep_uffd: false,
        keep_socket: false,
        ..Connect::new(fork.socket_path(), fixture.file.model())
    };
    vmm.run(connect).unwrap();
    check_reads_right(&vmm);
    vmm.kill().unwrap();
    wait_ended(&fork, ForkState::Exited);
}

// Children of the server's process: LESSONS 14.

#[test]
fn no_file_descriptor_of_the_server_reaches_a_child_process() {
    let children_have = || {
        let mut child = Command::new("ls")
            .arg("-l")
            .arg("/proc/self/fd")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut listing = String::new();
        child.stdout.take().unwrap().read_to_string(&mut listing).unwrap();
        assert!(child.wait().unwrap().success());
        listing.lines().filter(|line| line.contains(" -> ")).count()
    };
    let (own_before, child_before) = (fds_at_rest(), children_have());
    let fixture = small(|builder| {
        builder.deadlines(Deadlines {
            handshake: NEVER,
            ..Deadlines::default()
        })
    });
    // One of each: served, shaking hands, waiting, any number of VMMs.
    let (_served, vmm) = fixture.fork("served");
    check_reads_right(&vmm);
    let shaking_hands = fixture.register("shaking-hands");
    let peer = SimVmm::spawn().unwrap();
    let half_a_message = RawHandshake::new(shaking_hands.socket_path(), "[", &[FdKind::Uffd]);
    let _connection = peer.start(half_a_message).unwrap();
    eventually("it is taken in", || held_uffds() == 2);
    let _waiting = fixture.register("waiting");
    let options = ForkOptions::new(fixture.folder.path().join("any"));
    fixture.server.listen(&id("any"), &fixture.template, &options).unwrap();

    let mut kinds = Vec::new();
    for (number, target) in fds_at_rest()
        .into_iter()
        .filter(|(number, _)| !own_before.contains_key(number))
    {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
        assert_ne!(flags & rustix::fs::OFlags::CLOEXEC.bits(), 0, "{number} -> {target}");
        kinds.push(target);
    }
    for kind in ["userfaultfd", "pidfd", "eventfd", "eventpoll", "socket", "template.mem"] {
        assert!(kinds.iter().any(|target| target.contains(kind)), "{kind} in {kinds:?}");
    }
    assert_eq!(children_have(), child_before);
}

// Names and sockets are for one: LESSONS 17.

#[test]
fn of_many_that_want_one_socket_at_once_one_gets_it_and_keeps_it() {
    let fixture = small(|builder| builder);
    for round in 0..8 {
        let path = fixture.folder.path().join(format!("socket-{round}"));
        let start = Barrier::new(16);
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16)
                .map(|n| {
                    let (fixture, path, start) = (&fixture, &path, &start);
                    scope.spawn(move || {
                        let options = ForkOptions::new(path);
                        start.wait();
                        fixture
                            .server
                            .register(id(&format!("fork-{round}-{n}")), &fixture.template, &options)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (winners, losers): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        let [Ok(winner)] = &winners[..] else {
            panic!("one gets it: {winners:?}");
        };
        for loser in losers {
            assert!(matches!(loser, Err(Error::SocketInUse { .. })), "{loser:?}");
        }
        assert_eq!(fixture.server.forks().len(), 1, "the names of the others are free");
        let vmm = connect(&fixture, winner);
        wait_serving(winner);
        check_reads_right(&vmm);
        vmm.kill().unwrap();
        wait_ended(winner, ForkState::Exited);
        winner.forget().unwrap();
    }
    assert!(fixture.server.failures().is_empty());
}

#[test]
fn asking_for_a_socket_that_another_server_has_does_not_disturb_it() {
    let first = small(|builder| builder);
    let second = small(|builder| builder);
    let fork = first.register("fork");
    let options = ForkOptions::new(fork.socket_path());
    for _ in 0..100 {
        let refused = second.server.register(id("fork"), &second.template, &options);
        assert!(matches!(refused, Err(Error::SocketInUse { .. })), "{refused:?}");
    }
    let vmm = connect(&first, &fork);
    wait_serving(&fork);
    check_reads_right(&vmm);
}

#[test]
fn asking_for_the_socket_of_any_number_of_vmms_is_no_vmm() {
    let (fixture, events) = observed(|builder| builder);
    let path = listen(&fixture);
    let refused = fixture
        .server
        .register(id("fork"), &fixture.template, &ForkOptions::new(&path));
    assert!(matches!(refused, Err(Error::SocketInUse { .. })), "{refused:?}");
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&path, fixture.file.model())).unwrap();
    // The first that anybody hears of.
    let event = events.recv_timeout(PATIENCE).unwrap();
    let ForkEvent::Serving { id, .. } = event else {
        panic!("{event:?}")
    };
    assert_eq!(id.as_str(), "any-1");
}

// Forgetting forks.

#[test]
fn a_fork_that_waits_can_be_forgotten() {
    let fixture = small(|builder| builder);
    let before = open_fds();
    let fork = fixture.register("fork");
    fork.forget().unwrap();
    assert_eq!(failed_with(&fork.status()), "closed");
    eventually("its socket is gone", || !fork.socket_path().exists());
    assert_open(&before);
    assert!(fixture.server.forks().is_empty());
    assert!(fixture.server.fork(fork.id()).is_none());
    fork.forget().expect("forgetting twice is nothing");
    // Its name and its socket are free.
    let fork = fixture.register("fork");
    let vmm = connect(&fixture, &fork);
    check_reads_right(&vmm);
}

#[test]
fn a_fork_in_its_handshake_can_be_forgotten() {
    let fixture = small(|builder| {
        builder.deadlines(Deadlines {
            handshake: PATIENCE,
            ..Deadlines::default()
        })
    });
    let fork = fixture.register("fork");
    let vmm = SimVmm::spawn().unwrap();
    let peers = known_peers();
    let connection = vmm.start(RawHandshake::silent(fork.socket_path())).unwrap();
    eventually("it is taken in", || known_peers() > peers);
    fork.forget().unwrap();
    assert_eq!(failed_with(&fork.status()), "closed");
    assert!(connection.join().unwrap().closed_after_us.is_some());
}

#[test]
fn a_fork_that_is_served_cannot_be_forgotten_before_its_end() {
    let fixture = small(|builder| builder);
    let (fork, vmm) = fixture.fork("fork");
    let refused = fork.forget();
    assert!(matches!(refused, Err(Error::ForkInUse(_))), "{refused:?}");
    check_reads_right(&vmm);
    vmm.kill().unwrap();
    wait_ended(&fork, ForkState::Exited);
    fork.forget().unwrap();
    assert!(fixture.server.forks().is_empty());
    assert_eq!(fork.status().state, ForkState::Exited, "whoever holds it still knows");
}

#[test]
fn a_fork_that_failed_can_be_forgotten_and_its_failure_still_counts() {
    let fixture = small(|builder| builder);
    let fork = fixture.register("fork");
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(RawHandshake::new(fork.socket_path(), "no", &[FdKind::Uffd]))
        .unwrap();
    wait_ended(&fork, ForkState::Failed);
    fork.forget().unwrap();
    assert_eq!(fixture.server.failures().get("message_framing"), Some(&1));
}

/// The thread that VMMs meet is kept busy while one connects and somebody forgets its fork: whichever comes first, the
/// fork is either closed or served, not both.
#[test]
fn a_fork_whose_vmm_connects_while_it_is_forgotten_is_served() {
    let (busy, is_busy) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let may_go_on = Mutex::new(may_go_on);
    // Observers must not block, and here is what comes of it: nobody is accepted.
    let fixture = small(|builder| {
        builder.observer(move |event| {
            if let ForkEvent::Ended(status) = event
                && status.id.as_str() == "blocker"
            {
                busy.send(()).unwrap();
                may_go_on.lock().unwrap().recv().unwrap();
            }
        })
    });
    let fork = fixture.register("fork");
    // Registered later, so that the acceptor listens for the other when it gets to this.
    let blocker = fixture.register("blocker");
    let refused = SimVmm::spawn().unwrap();
    let _refused = refused
        .start(RawHandshake::new(blocker.socket_path(), "no", &[FdKind::Uffd]))
        .unwrap();
    is_busy.recv_timeout(PATIENCE).unwrap();

    let vmm = connect(&fixture, &fork);
    let forgotten = std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let fork = &fork;
        let forgetting = scope.spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
            fork.forget()
        });
        let stat = format!("/proc/self/task/{}/stat", told.recv_timeout(PATIENCE).unwrap());
        // It has asked the acceptor by then, and waits for what it does.
        eventually("the fork is about to be forgotten", || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit(')').next().unwrap().trim_start().starts_with('S')
        });
        go_on.send(()).unwrap();
        forgetting.join().unwrap()
    });
    assert!(
        matches!(forgotten, Err(Error::ForkInUse(_))),
        "its VMM was there first: {forgotten:?}"
    );
    assert_eq!(fork.status().state, ForkState::Serving, "{:?}", fork.status());
    check_reads_right(&vmm);
    fixture.server.close(PATIENCE).unwrap();
    wait_ended(&fork, ForkState::Complete);
    check_reads_right(&vmm);
}

#[test]
fn a_fork_that_is_forgotten_while_it_is_registered_leaves_no_socket() {
    let fixture = small(|builder| builder);
    let before = open_fds();
    for round in 0..200 {
        let name = format!("fork-{round}");
        let fork = std::thread::scope(|scope| {
            let forgetting = scope.spawn(|| {
                let known = || fixture.server.fork(&id(&name)).map(|fork| fork.forget()).is_some();
                eventually("it is known", known);
            });
            let fork = fixture.register(&name);
            forgetting.join().unwrap();
            fork
        });
        assert_eq!(failed_with(&fork.status()), "closed");
        eventually("its socket is gone", || !fork.socket_path().exists());
    }
    assert_open(&before);
}

#[test]
fn a_closed_server_takes_no_forks_and_keeps_none_waiting() {
    let fixture = small(|builder| builder);
    let waiting = fixture.register("waiting");
    let any = listen(&fixture);
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(failed_with(&waiting.status()), "closed");
    assert!(!waiting.socket_path().exists() && !any.exists(), "the sockets are gone");
    let options = ForkOptions::new(fixture.folder.path().join("late"));
    let late = fixture.server.register(id("late"), &fixture.template, &options);
    assert!(matches!(late, Err(Error::Closed)), "{late:?}");
    let late = fixture.server.listen(&id("late"), &fixture.template, &options);
    assert!(matches!(late, Err(Error::Closed)), "{late:?}");
    assert!(!fixture.folder.path().join("late").exists());
    waiting.forget().unwrap();
    fixture.server.close(PATIENCE).expect("closing twice is nothing");
}

// Any number of VMMs on one socket.

/// A fixture whose server tells of everything that happens.
fn observed(set_up: impl FnOnce(Builder) -> Builder) -> (Fixture, Receiver<ForkEvent>) {
    let (sender, events) = mpsc::channel();
    let fixture = small(|builder| {
        set_up(builder).observer(move |event| {
            // Nobody listens any more where the test is over.
            let _ = sender.send(event);
        })
    });
    (fixture, events)
}

/// Listens for any number of VMMs, `any-1` and so on.
fn listen(fixture: &Fixture) -> PathBuf {
    let path = fixture.folder.path().join("any");
    fixture
        .server
        .listen(&id("any"), &fixture.template, &ForkOptions::new(&path))
        .unwrap();
    path
}

#[test]
fn any_number_of_vmms_on_one_socket_are_served_each_for_itself() {
    let (fixture, events) = observed(|builder| builder);
    let before = open_fds();
    let path = listen(&fixture);
    let listening = open_fds();
    assert_ne!(listening, before);
    let next = || events.recv_timeout(PATIENCE).unwrap();
    let come = |expected: &str| {
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(Connect::new(&path, fixture.file.model())).unwrap();
        match next() {
            ForkEvent::Serving {
                id,
                pid,
                memory_bytes,
                regions,
            } => {
                assert_eq!(id.as_str(), expected);
                assert_eq!(u32::try_from(pid), Ok(vmm.pid()));
                assert_eq!((memory_bytes, regions), (SIZE, 1));
            }
            other => panic!("{other:?}"),
        }
        vmm
    };
    let forks = || -> Vec<_> {
        let all = fixture.server.forks().into_iter();
        all.map(|fork| (fork.id().to_string(), fork.status().state)).collect()
    };
    let serving = |name: &str| (name.to_owned(), ForkState::Serving);

    let first = come("any-1");
    let second = come("any-2");
    check_reads_right(&first);
    // Refused in between: of no concern to the others.
    let bad = SimVmm::spawn().unwrap();
    let report = bad.run(RawHandshake::new(&path, "[]", &[FdKind::DevNull])).unwrap();
    assert!(report.closed_after_us.is_some());
    let ForkEvent::Ended(refused) = next() else {
        panic!("the refused one ends")
    };
    assert_eq!((refused.id.as_str(), failed_with(&refused)), ("any-3", "not_a_uffd"));
    assert_eq!(refused.pid, i32::try_from(bad.pid()).ok());
    let third = come("any-4");
    assert_eq!(forks(), [serving("any-1"), serving("any-2"), serving("any-4")]);
    for vmm in [&first, &second, &third] {
        check_reads_right(vmm);
    }
    // Forgotten when they end, and only then.
    for (vmm, name, left) in [
        (first, "any-1", vec![serving("any-2"), serving("any-4")]),
        (third, "any-4", vec![serving("any-2")]),
        (second, "any-2", vec![]),
    ] {
        vmm.kill().unwrap();
        let ForkEvent::Ended(status) = next() else {
            panic!("{name} ends")
        };
        assert_eq!((status.id.as_str(), status.state), (name, ForkState::Exited));
        assert!(asked_or_given_back(&status) >= 256, "{status:?}");
        assert_eq!(forks(), left);
    }
    assert_eq!(
        fixture.server.failures().into_iter().collect::<Vec<_>>(),
        [("not_a_uffd", 1)]
    );
    // The socket is still there, for whoever comes next.
    check_reads_right(&come("any-5"));
    let ForkEvent::Ended(status) = next() else {
        panic!("any-5 ends")
    };
    assert_eq!(status.state, ForkState::Exited);
    drop(bad);
    assert_open(&listening);
    fixture.server.close(PATIENCE).unwrap();
    assert!(!path.exists());
}

// Peers that never speak: LESSONS 18.

/// More of them than may shake hands at once.
fn silent_peers(path: &std::path::Path) -> Vec<UnixStream> {
    // They come from this process: who says nothing is never killed.
    (0..200).map(|_| UnixStream::connect(path).unwrap()).collect()
}

#[test]
fn silent_peers_do_not_delay_vmms_on_other_sockets() {
    let fixture = small(|builder| {
        builder.deadlines(Deadlines {
            handshake: NEVER,
            ..Deadlines::default()
        })
    });
    let before = fixture.register("before");
    let peers = known_peers();
    let _silent = silent_peers(&listen(&fixture));
    // As many as ever will have been taken in.
    eventually("all who may shake hands do", || known_peers() > peers + 100);
    let after = fixture.register("after");
    for fork in [before, after] {
        // None of them ever goes away, so whoever waits for them is not served at all.
        let vmm = connect(&fixture, &fork);
        wait_serving(&fork);
        check_reads_right(&vmm);
    }
    assert!(fixture.server.failures().is_empty());
}

#[test]
fn silent_peers_delay_vmms_on_their_own_socket_by_no_more_than_the_deadline() {
    let (fixture, events) = observed(|builder| builder.deadlines(short_deadlines()));
    let path = listen(&fixture);
    let silent = silent_peers(&path);
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&path, fixture.file.model())).unwrap();
    check_reads_right(&vmm);
    for mut peer in silent {
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "its connection is closed");
    }
    for event in events.try_iter() {
        match event {
            ForkEvent::Refused { refusal, .. } => assert_eq!(refusal.code(), "handshake_deadline"),
            ForkEvent::Serving { pid, .. } => assert_eq!(u32::try_from(pid), Ok(vmm.pid())),
            other => panic!("{other:?}"),
        }
    }
    check_reads_right(&vmm);
}

#[test]
fn silent_peers_do_not_keep_a_server_from_closing() {
    let fixture = small(|builder| {
        builder.deadlines(Deadlines {
            handshake: NEVER,
            ..Deadlines::default()
        })
    });
    let fork = fixture.register("fork");
    let peers = known_peers();
    let one = UnixStream::connect(fork.socket_path()).unwrap();
    let many = silent_peers(&listen(&fixture));
    eventually("they are taken in", || known_peers() > peers + 100);
    fixture.server.close(PATIENCE).unwrap();
    assert_eq!(failed_with(&fork.status()), "closed");
    for mut peer in std::iter::once(one).chain(many) {
        // Reset, where it was never accepted.
        assert!(matches!(peer.read(&mut [0]), Ok(0) | Err(_)));
    }
}

#[test]
fn silent_peers_cost_no_processor_time() {
    let fixture = small(|builder| {
        builder.deadlines(Deadlines {
            handshake: NEVER,
            ..Deadlines::default()
        })
    });
    let peers = known_peers();
    let _silent = silent_peers(&listen(&fixture));
    eventually("all who may shake hands do", || known_peers() > peers + 100);
    let window = Duration::from_millis(500);
    let used = cpu_time_over(window);
    assert!(used < window / 4, "{used:?} of processor time in {window:?}");
}

// No file descriptor left.

/// Lets this process open so many more file descriptors, until this is dropped.
struct FewFds {
    before: Rlimit,
}

impl FewFds {
    fn left(count: usize) -> Self {
        let before = getrlimit(Resource::Nofile);
        // The limit is on the numbers, and the lowest that is free is taken: as many as are free below it.
        let open = fds_at_rest();
        let free = (0..).filter(|number| !open.contains_key(number));
        let limit = free.clone().nth(count).unwrap();
        let few = Rlimit {
            current: Some(u64::try_from(limit).unwrap()),
            ..before
        };
        setrlimit(Resource::Nofile, few).unwrap();
        Self { before }
    }
}

impl Drop for FewFds {
    fn drop(&mut self) {
        setrlimit(Resource::Nofile, self.before).unwrap();
    }
}

#[test]
fn without_file_descriptors_nobody_is_accepted_nobody_spins_and_all_are_served_later() {
    let fixture = small(|builder| builder);
    let (_served, served) = fixture.fork("served");
    let waiting = fixture.register("waiting");
    let vmm = SimVmm::spawn().unwrap();
    let listening = listen(&fixture);
    let other = SimVmm::spawn().unwrap();
    let few = FewFds::left(0);
    vmm.run(Connect::new(waiting.socket_path(), fixture.file.model()))
        .unwrap();
    other.run(Connect::new(&listening, fixture.file.model())).unwrap();
    let window = Duration::from_secs(1);
    let used = cpu_time_over(window);
    assert!(used < window / 4, "{used:?} of processor time in {window:?}");
    // Who is served needs none.
    check_reads_right(&served);
    assert_eq!(waiting.status().state, ForkState::Waiting);
    drop(few);
    wait_serving(&waiting);
    check_reads_right(&vmm);
    check_reads_right(&other);
    assert!(fixture.server.failures().is_empty());
}

#[test]
fn with_too_few_file_descriptors_a_vmm_is_refused_and_leaves_nothing() {
    // It takes one for the connection, one for its process, one for its userfaultfd, and one to see that it is one.
    let without_server = open_fds();
    for (left, code) in [(1, "fds_lost"), (2, "fds_lost"), (3, "not_a_uffd")] {
        let fixture = small(|builder| builder);
        let before = open_fds();
        let fork = fixture.register("fork");
        let vmm = SimVmm::spawn().unwrap();
        let few = FewFds::left(left);
        vmm.run(Connect::new(fork.socket_path(), fixture.file.model())).unwrap();
        let status = wait_ended(&fork, ForkState::Failed);
        eventually("its socket is gone", || !fork.socket_path().exists());
        drop(few);
        assert_eq!(failed_with(&status), code, "{status:?}");
        drop(vmm);
        assert_open(&before);
        // The threads of the server close what they hold soon after it.
        drop((fork, fixture));
        assert_open(&without_server);
    }
}
