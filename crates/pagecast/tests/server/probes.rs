//! Connections that are no VMM: a probe, a health check, another user. They leave a fork as it was (LESSONS 36).

use std::io::Read as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use pagecast::server::{Builder, Deadlines, Fork, ForkEvent, ForkOptions, ForkState};
use pagecast_testkit::peer::{Bytes, FdKind, Piece, RawHandshake};
use pagecast_testkit::sim_vmm::{AwaitClose, Connect, SimVmm};
use pagecast_testkit::skip::{Need, skip};

use crate::fixture::{
    Fixture, PATIENCE, assert_open, assert_reads_right, cpu_time_over, eventually, failed_with, held_uffds,
    known_peers, open_fds, read_everything,
};

/// The template's size in bytes.
const SIZE: u64 = 1 << 20;
/// Longer than any test: a deadline that plays no part.
const NEVER: Duration = Duration::from_hours(1);
/// More connections than may be in their handshake at one socket.
const MANY: usize = 200;

/// A server whose deadlines play no part, and its events.
fn observed(deadlines: Deadlines) -> (Fixture, Receiver<ForkEvent>) {
    let (sender, events) = mpsc::channel();
    let fixture = Fixture::with(SIZE, |builder: Builder| {
        builder.deadlines(deadlines).observer(move |event| {
            // Nobody listens any more where the test is over.
            let _ = sender.send(event);
        })
    });
    (fixture, events)
}

const PATIENT: Deadlines = Deadlines {
    connect: NEVER,
    handshake: NEVER,
    fault: NEVER,
};

/// Connects and closes, as `nc -zU` and health checks do.
fn probe(socket: &Path) {
    drop(UnixStream::connect(socket).unwrap());
}

/// The VMM of a fork comes, is served every byte, and its socket is gone.
fn assert_served(fixture: &Fixture, fork: &Fork) -> SimVmm {
    let vmm = SimVmm::spawn().unwrap();
    assert_serves(fixture, fork, &vmm);
    vmm
}

fn assert_serves(fixture: &Fixture, fork: &Fork, vmm: &SimVmm) {
    vmm.run(Connect::new(fork.socket_path(), fixture.file.model())).unwrap();
    let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
    assert_eq!(status.pid, i32::try_from(vmm.pid()).ok());
    eventually("the socket is gone, which is for one VMM", || {
        !fork.socket_path().exists()
    });
    assert_reads_right(vmm, read_everything(1));
}

fn assert_waiting(fork: &Fork) {
    let status = fork.status();
    assert_eq!(status.state, ForkState::Waiting, "{status:?}");
    assert_eq!(status.pid, None, "{status:?}");
}

/// Waits until this many connections were refused.
fn refused(fork: &Fork, code: &str, count: u64) {
    eventually("they are refused", || fork.refusals().get(code) == Some(&count));
    assert_eq!(fork.refusals().values().sum::<u64>(), count, "{:?}", fork.refusals());
    assert_waiting(fork);
}

fn assert_closed(mut peer: UnixStream) {
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    // Reset, where it was never accepted.
    let read = peer.read(&mut [0]);
    assert!(
        matches!(&read, Ok(0)) || matches!(&read, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset),
        "{read:?}"
    );
}

#[test]
fn a_probe_that_connects_and_closes_leaves_the_fork_waiting() {
    let (fixture, events) = observed(PATIENT);
    let before = open_fds();
    let fork = fixture.register("fork");
    let waiting = open_fds();
    for count in 1..=5 {
        probe(fork.socket_path());
        refused(&fork, "hung_up", count);
    }
    assert_open(&waiting);
    assert_served(&fixture, &fork).kill().unwrap();
    fork.wait(PATIENCE, ForkState::is_end);
    assert_open(&before);
    assert!(fixture.server.failures().is_empty(), "{:?}", fixture.server.failures());
    for event in events.iter().take(5) {
        let ForkEvent::Refused { id, pid, refusal, .. } = event else {
            panic!("{event:?}")
        };
        assert_eq!(id.as_ref(), Some(fork.id()));
        assert_eq!(pid.and_then(|pid| u32::try_from(pid).ok()), Some(std::process::id()));
        assert_eq!(refusal.code(), "hung_up");
    }
}

#[test]
fn whoever_says_something_without_a_file_descriptor_leaves_the_fork_waiting() {
    let (fixture, _events) = observed(PATIENT);
    let fork = fixture.register("fork");
    let peer = SimVmm::spawn().unwrap();
    for (message, code) in [("GET / HTTP/1.1\r\n\r\n", "message_framing"), ("[]", "no_fd")] {
        let report = peer.run(RawHandshake::new(fork.socket_path(), message, &[])).unwrap();
        assert!(report.closed_after_us.is_some(), "it is told: {report:?}");
        assert_waiting(&fork);
        // It is counted after the connection is closed.
        eventually("it is counted", || fork.refusals().get(code) == Some(&1));
    }
    assert_served(&fixture, &fork);
}

#[test]
fn silent_peers_do_not_keep_the_vmm_of_their_fork_out() {
    let (fixture, _events) = observed(PATIENT);
    let fork = fixture.register("fork");
    // One that says half of what a VMM says.
    let half = SimVmm::spawn().unwrap();
    let peers = known_peers();
    let silent: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(fork.socket_path()).unwrap())
        .collect();
    let half = half.start(RawHandshake::new(fork.socket_path(), "[", &[])).unwrap();
    eventually("all are taken in", || known_peers() == peers + 21);
    assert_waiting(&fork);
    let vmm = assert_served(&fixture, &fork);
    silent.into_iter().for_each(assert_closed);
    assert!(half.join_within(PATIENCE).unwrap().closed_after_us.is_some());
    assert_eq!(fork.refusals().into_iter().collect::<Vec<_>>(), [("too_late", 21)]);
    assert_reads_right(&vmm, read_everything(2));
    assert!(fixture.server.failures().is_empty());
}

#[test]
fn more_silent_peers_than_may_shake_hands_keep_the_vmm_out_no_longer_than_their_deadline() {
    let (fixture, _events) = observed(Deadlines {
        handshake: Duration::from_secs(1),
        ..PATIENT
    });
    let fork = fixture.register("fork");
    let silent: Vec<_> = (0..MANY)
        .map(|_| UnixStream::connect(fork.socket_path()).unwrap())
        .collect();
    assert_served(&fixture, &fork);
    silent.into_iter().for_each(assert_closed);
}

#[test]
fn a_connection_by_the_wrong_user_leaves_the_fork_waiting_whatever_it_sends() {
    if !rustix::process::geteuid().is_root() {
        return skip((Need::Root, "to register forks for other users"));
    }
    let (fixture, _events) = observed(PATIENT);
    // Root can connect to anybody's socket, but is not whom this one is for.
    let fork = fixture.register_with("fork", |options| options.user(54321));
    let vmm = SimVmm::spawn().unwrap();
    let handshake = RawHandshake::new(fork.socket_path(), "[]", &[FdKind::Uffd]);
    let report = vmm.run(handshake).unwrap();
    assert!(report.closed_after_us.is_some(), "{report:?}");
    refused(&fork, "wrong_user", 1);
    // Its uid is looked at first, also where the process is gone by then.
    probe(fork.socket_path());
    refused(&fork, "wrong_user", 2);
    assert!(fork.socket_path().exists());
    assert!(fixture.server.failures().is_empty());
}

#[test]
fn a_vmm_with_a_bad_message_ends_its_fork_and_all_other_handshakes_of_it() {
    let (fixture, _events) = observed(PATIENT);
    let bad = SimVmm::spawn().unwrap();
    let before = open_fds();
    let fork = fixture.register("fork");
    let peers = known_peers();
    let silent = UnixStream::connect(fork.socket_path()).unwrap();
    eventually("it is taken in", || known_peers() == peers + 1);
    let report = bad
        .run(RawHandshake::new(fork.socket_path(), "[]", &[FdKind::Uffd]))
        .unwrap();
    assert!(report.closed_after_us.is_some(), "{report:?}");
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(failed_with(&status), "no_regions");
    assert_eq!(status.pid, i32::try_from(bad.pid()).ok());
    eventually("its socket is gone", || !fork.socket_path().exists());
    assert_closed(silent);
    assert_open(&before);
}

#[test]
fn a_vmm_that_dies_after_it_has_sent_its_userfaultfd_ends_its_fork() {
    let (fixture, _events) = observed(PATIENT);
    let fork = fixture.register("fork");
    let vmm = SimVmm::spawn().unwrap();
    let half = RawHandshake::new(fork.socket_path(), "[", &[FdKind::Uffd]);
    let _connection = vmm.start(half).unwrap();
    eventually("its userfaultfd is here", || held_uffds() == 1);
    assert_waiting(&fork);
    vmm.kill().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(failed_with(&status), "hung_up");
    eventually("it is closed", || held_uffds() == 0);
}

#[test]
fn a_file_descriptor_that_comes_after_the_first_bytes_makes_a_vmm() {
    let (fixture, _events) = observed(PATIENT);
    let message = format!(
        r#"[{{"base_host_virt_addr":{},"size":{SIZE},"offset":0,"page_size":4096}}]"#,
        0x7f00_0000_0000u64
    );
    let (first, rest) = message.split_at(10);
    let piece = |bytes: &str, fds: &[FdKind]| Piece {
        bytes: Bytes::from(bytes.as_bytes()),
        fds: fds.to_owned(),
    };
    let fork = fixture.register("fork");
    let peer = SimVmm::spawn().unwrap();
    let pieces = vec![piece(first, &[]), piece(rest, &[FdKind::Uffd])];
    let _connection = peer
        .start(RawHandshake {
            pieces,
            ..RawHandshake::silent(fork.socket_path())
        })
        .unwrap();
    let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
}

/// How many probes are a flood.
const PROBES: u64 = 3000;

#[test]
fn a_flood_of_probes_is_counted_reported_a_few_times_and_leaves_nothing() {
    let (fixture, events) = observed(PATIENT);
    let fork = fixture.register("fork");
    let waiting = open_fds();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..PROBES / 4).for_each(|_| probe(fork.socket_path())));
        }
    });
    refused(&fork, "hung_up", PROBES);
    assert_open(&waiting);
    let reported = events.try_iter().count();
    // Eight in ten seconds: a few times more on a machine that takes long for this.
    assert!((1..100).contains(&reported), "{reported}");
    let window = Duration::from_millis(500);
    let used = cpu_time_over(window);
    assert!(used < window / 4, "{used:?} of processor time in {window:?}");
    assert_served(&fixture, &fork);
}

#[test]
fn the_deadline_to_connect_holds_while_others_probe_and_its_reason_counts_them() {
    let (fixture, _events) = observed(Deadlines {
        connect: Duration::from_secs(2),
        ..PATIENT
    });
    let fork = fixture.register("fork");
    let silent = UnixStream::connect(fork.socket_path()).unwrap();
    let mut probes = 0;
    // Refused or not, they may find the socket gone.
    while UnixStream::connect(fork.socket_path()).is_ok() {
        probes += 1;
    }
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(failed_with(&status), "connect_deadline");
    assert_closed(silent);
    let reason = pagecast::server::chain(status.reason.as_deref().unwrap());
    assert!(probes > 1, "{probes}");
    assert!(reason.contains("connections were refused"), "{reason}");
}

#[test]
fn a_vmm_that_has_sent_its_userfaultfd_before_the_deadline_to_connect_may_end_its_handshake() {
    // A machine that is too busy for a deadline gets a longer one.
    for seconds in [1, 4, 16] {
        let connect = Duration::from_secs(seconds);
        let (fixture, _events) = observed(Deadlines { connect, ..PATIENT });
        let fork = fixture.register("fork");
        // A fork whose deadline is later: when it has ended, that of the first is over.
        let later = fixture.register("later");
        let vmm = SimVmm::spawn().unwrap();
        let half = RawHandshake::new(fork.socket_path(), "[", &[FdKind::Uffd]);
        let half = vmm.start(half).unwrap();
        eventually("it is taken in or too late", || {
            held_uffds() == 1 || fork.status().state.is_end()
        });
        later.wait(PATIENCE, ForkState::is_end);
        if fork.status().state.is_end() {
            continue;
        }
        assert_waiting(&fork);
        // No time is wasted on waiting until its own deadline.
        let window = Duration::from_millis(500);
        let used = cpu_time_over(window);
        assert!(used < window / 4, "{used:?} of processor time in {window:?}");
        vmm.kill().unwrap();
        drop(half);
        let status = fork.wait(PATIENCE, ForkState::is_end);
        assert_eq!(failed_with(&status), "hung_up");
        return;
    }
    panic!("no deadline was long enough");
}

// Ends of a fork that several shake hands for.

/// Something that ends a fork.
type End = fn(&Fixture, &Fork);

#[test]
fn a_fork_is_forgotten_closed_or_withdrawn_while_several_shake_hands() {
    let ends: [(&str, End); 4] = [
        ("closed", |_, fork| fork.forget().unwrap()),
        ("closed", |_, fork| fork.kill()),
        ("template_changed", |fixture, _| {
            assert_eq!(fixture.server.withdraw(&fixture.template, "written"), 1);
        }),
        ("closing", |fixture, _| fixture.server.close(PATIENCE).unwrap()),
    ];
    let without_server = open_fds();
    for (code, end) in ends {
        let (fixture, events) = observed(PATIENT);
        let vmm = SimVmm::spawn().unwrap();
        let before = open_fds();
        let fork = fixture.register("fork");
        let peers = known_peers();
        let silent: Vec<_> = (0..10)
            .map(|_| UnixStream::connect(fork.socket_path()).unwrap())
            .collect();
        let half = vmm
            .start(RawHandshake::new(fork.socket_path(), "[", &[FdKind::Uffd]))
            .unwrap();
        eventually("all are taken in", || known_peers() == peers + 11 && held_uffds() == 1);
        end(&fixture, &fork);
        let status = fork.wait(PATIENCE, ForkState::is_end);
        assert_eq!(failed_with(&status), code);
        silent.into_iter().for_each(assert_closed);
        assert!(half.join_within(PATIENCE).unwrap().closed_after_us.is_some());
        eventually("its socket is gone", || !fork.socket_path().exists());
        if code != "closing" {
            assert_open(&before);
        }
        // The threads of the server close what they hold soon after it.
        drop((vmm, fork, fixture, events));
        assert_open(&without_server);
    }
}

// What could block the thread that all connections come to.

#[test]
fn a_folder_that_somebody_has_locked_holds_up_no_handshake_and_no_stop() {
    let (fixture, _events) = observed(PATIENT);
    let fork = fixture.register("fork");
    let waiting = fixture.register("waiting");
    let folder = std::fs::File::open(fixture.folder.path()).unwrap();
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let vmm = assert_served(&fixture, &fork);
    waiting.forget().unwrap();
    eventually("its socket is gone", || !waiting.socket_path().exists());
    assert_served(&fixture, &fixture.register("later"));
    fixture.server.close(PATIENCE).unwrap();
    assert_reads_right(&vmm, read_everything(2));
}

/// Closing it waits an hour for somebody to read: as closing a file of a FUSE server waits for that.
#[test]
fn a_file_descriptor_whose_close_blocks_holds_up_nobody_else() {
    let (fixture, _events) = observed(PATIENT);
    let fork = fixture.register("fork");
    let other = fixture.register("other");
    // Before the server has what blocks: a process that is just being started has a copy of it, and closes that.
    let vmm = SimVmm::spawn().unwrap();
    let bad = SimVmm::spawn().unwrap();
    let piece = |bytes: &str, fds: &[FdKind]| Piece {
        bytes: Bytes::from(bytes.as_bytes()),
        fds: fds.to_owned(),
    };
    // It has closed its own copy before it sends the second piece, so that of the server is the last.
    let _connection = bad
        .start(RawHandshake {
            pieces: vec![piece("[", &[FdKind::LingeringSocket]), piece("]", &[])],
            ..RawHandshake::silent(fork.socket_path())
        })
        .unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(failed_with(&status), "not_a_uffd");
    assert_serves(&fixture, &other, &vmm);
    fixture.server.close(PATIENCE).unwrap();
}

// The socket of any number of VMMs.

/// Listens for any number of VMMs, whose forks are named `any-1` and so on. The path of the socket.
fn listen_for_any(fixture: &Fixture) -> PathBuf {
    let path = fixture.folder.path().join("any");
    fixture
        .server
        .listen(&"any".parse().unwrap(), &fixture.template, &ForkOptions::new(&path))
        .unwrap();
    path
}

#[test]
fn a_probe_of_the_socket_of_any_number_of_vmms_makes_no_fork() {
    let (fixture, events) = observed(PATIENT);
    let path = listen_for_any(&fixture);
    let listening = open_fds();
    let peers = known_peers();
    let silent = UnixStream::connect(&path).unwrap();
    for _ in 0..MANY {
        probe(&path);
    }
    eventually("only one shakes hands", || known_peers() == peers + 1);
    assert!(fixture.server.forks().is_empty(), "{:?}", fixture.server.forks());
    assert!(fixture.server.failures().is_empty(), "{:?}", fixture.server.failures());
    silent.shutdown(Shutdown::Both).unwrap();
    drop(silent);
    assert_open(&listening);
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&path, fixture.file.model())).unwrap();
    assert_reads_right(&vmm, read_everything(1));
    let first = events.iter().find_map(|event| match event {
        ForkEvent::Refused { id: None, .. } => None,
        event => Some(event),
    });
    // The first name that anybody gets.
    assert!(
        matches!(&first, Some(ForkEvent::Serving { id, .. }) if id.as_str() == "any-1"),
        "{first:?}"
    );
}

#[test]
fn a_vmm_that_is_refused_at_the_socket_of_any_number_is_a_fork_that_failed() {
    let (fixture, events) = observed(PATIENT);
    let path = listen_for_any(&fixture);
    let bad = SimVmm::spawn().unwrap();
    bad.run(RawHandshake::new(&path, "[]", &[FdKind::Uffd])).unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    let ForkEvent::Ended(status) = event else {
        panic!("{event:?}")
    };
    assert_eq!((status.id.as_str(), failed_with(&status)), ("any-1", "no_regions"));
    assert!(fixture.server.forks().is_empty());
    let _ = bad.run(AwaitClose { within_ms: 1 });
}
