//! The simulated VMM against the smallest page server there can be: it finds right what is right, and wrong what is not.
#![expect(clippy::unwrap_used, reason = "clippy takes what tests share for something else")]

mod page_server;

use std::num::{NonZeroU32, NonZeroU64};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use page_server::{Ending, Flaw, PageServer};
use pagecast_testkit::PageSize;
use pagecast_testkit::hugepages::HugePages;
use pagecast_testkit::peer::{Bytes, FdKind, Piece, RawHandshake, Then};
use pagecast_testkit::process::{MemoryUse, ProcessUse};
use pagecast_testkit::sim_vmm::{
    AwaitClose, ClearNonblock, Connect, HandshakeForm, History, Latency, MapFile, Order, Pages, Read, Region, Remove,
    RemoveRace, Share, SimVmm, Touch, TouchOutside, Write,
};
use pagecast_testkit::skip::{Need, skip};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};
use pagecast_uffd::{PeerCredentials, fd_passing};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

const PAGE: u64 = 4096;

fn some(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).unwrap()
}

/// 8 MiB with data, zeros and holes.
fn template() -> TemplateFile {
    TemplateFile::create(TemplateModel {
        size: 8 << 20,
        seed: 1,
        layout: Layout {
            zero_every: NonZeroU64::new(7),
            holes: vec![100..200, 1000..1024],
        },
    })
    .unwrap()
}

/// A template, a server with this flaw for it, and a VMM that is connected.
fn connected(flaw: Flaw) -> (TemplateFile, PageServer, SimVmm) {
    let template = template();
    let server = PageServer::start(&template, flaw);
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(server.socket(), template.model())).unwrap();
    (template, server, vmm)
}

#[test]
fn right_bytes_are_found_right() {
    let (template, server, vmm) = connected(Flaw::None);
    let report = vmm
        .run(Read {
            threads: 4,
            order: Order::Random(1),
            share: Share::Everything,
            passes: 2,
            ..Read::default()
        })
        .unwrap();
    assert_eq!(report.checked.pages, 2 * 4 * 2048);
    assert_eq!(report.checked.mismatches, 0, "{:?}", report.checked);
    assert!(server.faults() >= 2048, "every page was faulted in");
    assert!(MemoryUse::of(vmm.pid()).unwrap().private_bytes >= 8 << 20);
    template.check_untouched().unwrap();
}

#[test]
fn a_mapped_mem_file_is_shared_until_it_is_written() {
    let template = template();
    let vmms: Vec<SimVmm> = (0..2).map(|_| SimVmm::spawn().unwrap()).collect();
    for vmm in &vmms {
        vmm.run(MapFile::new(template.path(), template.model())).unwrap();
        let checked = vmm.run(Read::default()).unwrap().checked;
        assert_eq!((checked.pages, checked.mismatches), (2048, 0), "{checked:?}");
    }
    let memory = || MemoryUse::of_file(vmms[0].pid(), template.path()).unwrap();
    let before = memory();
    assert!(
        (before.shared_bytes, before.private_bytes) == (8 << 20, 0),
        "{before:?}"
    );

    vmms[0]
        .run(Write {
            pages: Pages::range(0..1024),
            generation: some(1),
            threads: 1,
        })
        .unwrap();
    let after = memory();
    assert!(
        (after.shared_bytes, after.private_bytes) == (4 << 20, 4 << 20),
        "{after:?}"
    );
    for vmm in &vmms {
        let checked = vmm.run(Read::default()).unwrap().checked;
        assert_eq!(checked.mismatches, 0, "{checked:?}");
    }
    template.check_untouched().unwrap();

    assert!(
        vmms[1].run(Remove::range(0..1)).is_err(),
        "the file's bytes would come back"
    );
}

#[test]
fn a_mapped_mem_file_with_wrong_bytes_is_found_wrong() {
    let template = template();
    let vmm = SimVmm::spawn().unwrap();
    let other = TemplateModel {
        seed: 2,
        ..template.model().clone()
    };
    vmm.run(MapFile::new(template.path(), &other)).unwrap();
    let checked = vmm.run(Read::default()).unwrap().checked;
    assert!(
        checked.mismatches > 0 && checked.mismatches < 2048,
        "zeros are right: {checked:?}"
    );
}

#[test]
fn every_form_of_the_handshake_and_several_regions_are_served() {
    for form in [
        HandshakeForm::Array,
        HandshakeForm::ArrayPageSizeKib,
        HandshakeForm::Object,
    ] {
        let template = template();
        let server = PageServer::start(&template, Flaw::None);
        let vmm = SimVmm::spawn().unwrap();
        let connect = Connect {
            form,
            regions: vec![
                Region {
                    size: 6 << 20,
                    offset: 2 << 20,
                },
                Region {
                    size: 1 << 20,
                    offset: 0,
                },
            ],
            ..Connect::new(server.socket(), template.model())
        };
        let connected = vmm.run(connect).unwrap();
        assert_eq!(connected.base_host_virt_addrs.len(), 2);
        // Across the end of the first region.
        let pages = Pages::range(1500..1600);
        let report = vmm
            .run(Read {
                pages: pages.clone().every(some(3)),
                ..Read::default()
            })
            .unwrap();
        assert_eq!((report.checked.pages, report.checked.mismatches), (34, 0), "{form:?}");
        vmm.run(Remove::range(1530..1540)).unwrap();
        let report = vmm
            .run(Read {
                pages,
                ..Read::default()
            })
            .unwrap();
        assert_eq!(report.checked.mismatches, 0, "{form:?}: {:?}", report.checked);
    }
}

#[test]
fn a_corrupted_page_is_reported_where_it_is() {
    let offset = 300 * PAGE + 1024;
    let (_template, server, vmm) = connected(Flaw::FlipByte { offset });
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!((report.checked.mismatches, report.checked.stale), (1, 0));
    let mismatch = report.checked.first_mismatch.unwrap();
    assert_eq!((mismatch.page, mismatch.offset), (300, offset));
    assert_eq!(mismatch.address, server.first_region_base() + offset);
    assert_eq!(mismatch.found ^ mismatch.expected, 0xff);
}

#[test]
fn writes_and_removals_are_remembered() {
    let (template, _server, vmm) = connected(Flaw::None);
    // On pages that are absent, on pages that are there, and over an earlier write.
    let write = |pages: Pages, generation| {
        vmm.run(Write {
            pages,
            generation: some(generation),
            threads: 2,
        })
        .unwrap()
    };
    assert_eq!(write(Pages::ALL.every(some(2)), 1).pages, 1024);
    write(Pages::range(0..64), 2);
    vmm.run(Remove {
        ranges: vec![32..96, 500..501],
    })
    .unwrap();
    write(Pages::range(40..50), 3);
    let report = vmm
        .run(Read {
            threads: 3,
            ..Read::default()
        })
        .unwrap();
    assert_eq!(report.checked.mismatches, 0, "{:?}", report.checked);
    template.check_untouched().unwrap();
}

#[test]
fn template_bytes_in_a_removed_page_are_stale() {
    let (_template, _server, vmm) = connected(Flaw::ForgetRemovals);
    vmm.run(Read::default()).unwrap();
    vmm.run(Remove::range(8..10)).unwrap();
    let checked = vmm.run(Read::default()).unwrap().checked;
    assert_eq!((checked.mismatches, checked.stale), (2, 2));
    let removed = History {
        removed: true,
        written: None,
    };
    assert_eq!(checked.first_mismatch.unwrap().history, removed);
}

#[test]
fn a_page_that_was_wrong_under_a_write_is_found() {
    let (_template, _server, vmm) = connected(Flaw::ZerosForWrites);
    vmm.run(Write {
        pages: Pages::range(0..5),
        generation: some(9),
        threads: 1,
    })
    .unwrap();
    let checked = vmm.run(Read::default()).unwrap().checked;
    assert_eq!((checked.mismatches, checked.stale), (5, 0));
    assert_eq!(checked.first_mismatch.unwrap().history.written, Some(some(9)));
}

#[test]
fn a_race_with_removals_passes_with_a_right_server() {
    let (template, _server, vmm) = connected(Flaw::None);
    // On a busy machine one race may not come to much.
    let until = Instant::now() + Duration::from_mins(1);
    let (mut removals, mut writes) = (0, 0);
    for seed in 5.. {
        let race = RemoveRace {
            millis: 500,
            threads: 3,
            seed,
        };
        let report = vmm.run(race).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
        removals += report.removals;
        writes += report.writes;
        if (removals > 100 && writes > 10) || Instant::now() > until {
            break;
        }
    }
    assert!(removals > 100 && writes > 10, "{removals} removals, {writes} writes");
    template.check_untouched().unwrap();
}

#[test]
fn a_race_with_removals_finds_stale_bytes() {
    for flaw in [Flaw::ForgetRemovals, Flaw::DecideEarly] {
        let (_template, _server, vmm) = connected(flaw);
        let race = |seed| RemoveRace {
            millis: 300,
            threads: 4,
            seed,
        };
        // A removal has to come at the wrong moment, and on a busy machine one race may have none that does.
        let until = Instant::now() + Duration::from_mins(1);
        let mut found = false;
        for seed in 5.. {
            found = vmm.run(race(seed)).unwrap().checked.stale > 0;
            if found || Instant::now() > until {
                break;
            }
        }
        assert!(found, "{flaw:?}");
    }
}

#[test]
fn latency_and_throughput_count_what_they_touch() {
    let (_template, server, vmm) = connected(Flaw::None);
    let latency = vmm
        .run(Latency {
            pages: Pages::range(0..500),
            order: Order::Random(2),
        })
        .unwrap();
    assert_eq!((latency.count, server.faults()), (500, 500));
    assert!(latency.p50_ns <= latency.p90_ns && latency.p90_ns <= latency.p99_ns && latency.p99_ns <= latency.max_ns);
    assert!(
        latency.p50_ns > 500,
        "a fault is served by another process: {latency:?}"
    );
    assert!(latency.total_ns >= latency.max_ns);
    let touch = Touch {
        pages: Pages::range(500..2048),
        threads: 4,
        order: Order::Sequential,
    };
    assert_eq!((vmm.run(touch).unwrap().pages, server.faults()), (1548, 2048));
}

#[test]
fn a_killed_vmm_hangs_up_and_its_jobs_say_so() {
    let (_template, server, vmm) = connected(Flaw::IgnoreFaults);
    let reading = vmm.start(Read::default()).unwrap();
    server.wait_for_a_fault();
    let unanswered = vmm.start(Touch {
        pages: Pages::range(0..1),
        threads: 1,
        order: Order::Sequential,
    });
    let error = unanswered.unwrap().join_within(Duration::from_millis(50)).unwrap_err();
    assert!(error.to_string().contains("not done with touch in time"), "{error}");
    assert!(!reading.is_done());
    assert_eq!(vmm.kill().unwrap().signal(), Some(9));
    assert_eq!(server.wait(), Ending::HungUp);
    let error = reading.join().unwrap_err();
    assert!(
        error.to_string().contains("died before it was done with read"),
        "{error}"
    );
    assert!(ProcessUse::of(vmm.pid()).is_err(), "it is reaped");
}

#[test]
fn it_exits_when_asked_and_with_its_test() {
    assert_eq!(SimVmm::spawn().unwrap().exit(3).unwrap().code(), Some(3));
    assert_eq!(SimVmm::spawn().unwrap().abort().unwrap().signal(), Some(6));
    let mut alone = std::process::Command::new(env!("CARGO_BIN_EXE_sim-vmm"));
    assert!(alone.stdin(Stdio::null()).status().unwrap().success());
}

#[test]
fn a_refused_vmm_sees_its_connection_closed() {
    let (_template, server, vmm) = connected(Flaw::None);
    let open = vmm.run(AwaitClose { within_ms: 20 }).unwrap();
    assert_eq!(open.after_us, None);
    let waiting = vmm.start(AwaitClose { within_ms: 60_000 }).unwrap();
    server.stop();
    assert!(waiting.join().unwrap().after_us.is_some());
}

#[test]
fn a_fault_outside_the_handshake_reaches_the_server() {
    let (_template, server, vmm) = connected(Flaw::None);
    let outside = vmm.start(TouchOutside).unwrap();
    assert_eq!(server.wait(), Ending::FaultOutside);
    vmm.kill().unwrap();
    assert!(outside.join().is_err());
}

/// A listener that the test itself accepts from.
fn listener() -> (tempfile::TempDir, std::path::PathBuf, UnixListener) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    (directory, socket, listener)
}

#[test]
fn an_old_vmm_closes_its_socket_and_a_careless_one_its_uffd() {
    let (_directory, socket, listener) = listener();
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect {
        keep_socket: false,
        keep_uffd: false,
        ..Connect::new(&socket, &TemplateModel::of_data(PAGE, 1))
    };
    vmm.run(connect).unwrap();
    let (connection, _) = listener.accept().unwrap();
    let mut fds = Vec::new();
    let mut buffer = vec![0; 4096];
    let received = fd_passing::receive(connection.as_fd(), &mut buffer, &mut fds).unwrap();
    assert!(received.bytes > 0 && received.fds == 1);
    let end = fd_passing::receive(connection.as_fd(), &mut buffer, &mut fds).unwrap();
    assert_eq!(end.bytes, 0, "the end of the stream");
    let kept = std::fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap();
    let kept = kept.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    assert!(
        kept.into_iter()
            .all(|target| !target.to_string_lossy().contains("userfaultfd"))
    );
}

#[test]
fn a_hostile_vmm_clears_nonblock_of_the_shared_uffd() {
    let (_directory, socket, listener) = listener();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&socket, &TemplateModel::of_data(PAGE, 1)))
        .unwrap();
    let (connection, _) = listener.accept().unwrap();
    let mut fds = Vec::new();
    fd_passing::receive(connection.as_fd(), &mut [0; 4096], &mut fds).unwrap();
    assert!(rustix::fs::fcntl_getfl(&fds[0]).unwrap().contains(OFlags::NONBLOCK));
    vmm.run(ClearNonblock).unwrap();
    assert!(!rustix::fs::fcntl_getfl(&fds[0]).unwrap().contains(OFlags::NONBLOCK));
}

#[test]
fn a_raw_handshake_sends_what_it_is_told() {
    let (_directory, socket, listener) = listener();
    let vmm = SimVmm::spawn().unwrap();
    let handshake = RawHandshake {
        pieces: vec![
            Piece {
                bytes: Bytes::from(&b"\xff\xfe"[..]),
                fds: vec![
                    FdKind::Uffd,
                    FdKind::UffdWithoutApi,
                    FdKind::DevNull,
                    FdKind::Pipe,
                    FdKind::Memfd,
                ],
            },
            Piece {
                bytes: Bytes::from(&b"[]"[..]),
                fds: Vec::new(),
            },
        ],
        then: Then::Close,
        ..RawHandshake::silent(&socket)
    };
    let report = vmm.run(handshake).unwrap();
    assert_eq!((report.sent, report.closed_after_us), (4, None));
    let (connection, _) = listener.accept().unwrap();
    let mut fds = Vec::new();
    let mut message = Vec::new();
    loop {
        let mut buffer = [0; 64];
        let received = fd_passing::receive(connection.as_fd(), &mut buffer, &mut fds).unwrap();
        if received.bytes == 0 {
            break;
        }
        message.extend_from_slice(&buffer[..received.bytes]);
    }
    assert_eq!(message, b"\xff\xfe[]");
    let what = |fd: &std::os::fd::OwnedFd| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd)));
        link.unwrap().to_string_lossy().into_owned()
    };
    let kinds: Vec<String> = fds.iter().map(what).collect();
    assert_eq!(
        kinds[..3],
        ["anon_inode:[userfaultfd]", "anon_inode:[userfaultfd]", "/dev/null"]
    );
    assert!(
        kinds[3].starts_with("pipe:") && kinds[4].starts_with("/memfd:"),
        "{kinds:?}"
    );
}

#[test]
fn a_raw_handshake_reports_when_the_server_hangs_up() {
    let (_directory, socket, listener) = listener();
    let vmm = SimVmm::spawn().unwrap();

    let silent = RawHandshake {
        within_ms: 20,
        ..RawHandshake::silent(&socket)
    };
    assert_eq!(vmm.run(silent).unwrap().closed_after_us, None);
    drop(listener.accept().unwrap());

    let pieces = RawHandshake::new(&socket, "[1,2,3]", &[FdKind::DevNull]).in_pieces_of(2);
    assert_eq!(pieces.pieces.len(), 4);
    assert_eq!(
        pieces.pieces.iter().map(|piece| piece.fds.len()).collect::<Vec<_>>(),
        [1, 0, 0, 0]
    );
    let waiting = vmm.start(pieces).unwrap();
    drop(listener.accept().unwrap());
    assert!(waiting.join().unwrap().closed_after_us.is_some());

    let endless = RawHandshake {
        then: Then::RepeatLast,
        ..RawHandshake::new(&socket, [b' '; 4096], &[])
    };
    let sending = vmm.start(endless).unwrap();
    let (connection, _) = listener.accept().unwrap();
    let mut read = 0;
    while read < 1 << 20 {
        rustix::event::poll(&mut [PollFd::new(&connection, PollFlags::IN)], None).unwrap();
        read += fd_passing::receive(connection.as_fd(), &mut [0; 8192], &mut Vec::new())
            .unwrap()
            .bytes;
    }
    drop(connection);
    let report = sending.join().unwrap();
    assert!(report.closed_after_us.is_some() && report.sent >= 1 << 20, "{report:?}");
}

#[test]
fn a_vmm_of_another_user_is_seen_as_such() {
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to start processes of other users"));
        return;
    }
    let (directory, socket, listener) = listener();
    for path in [directory.path(), socket.as_path()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let vmm = match SimVmm::spawn_as(54321) {
        Ok(vmm) => vmm,
        Err(error) => {
            skip(&format!("{error:#}"));
            return;
        }
    };
    let waiting = vmm.start(RawHandshake::new(&socket, "[]", &[])).unwrap();
    let (connection, _) = listener.accept().unwrap();
    assert_eq!(PeerCredentials::of(connection.as_fd()).unwrap().uid, 54321);
    drop(connection);
    assert!(waiting.join().unwrap().closed_after_us.is_some());
}

#[test]
fn huge_pages_are_served_removed_and_written() {
    let Some(reserved) = HugePages::reserve(4).unwrap() else {
        return;
    };
    let template = template();
    let server = PageServer::start(&template, Flaw::None);
    let vmm = SimVmm::spawn().unwrap();
    let connect = Connect {
        page_size: PageSize::Huge,
        ..Connect::new(server.socket(), template.model())
    };
    vmm.run(connect).unwrap();
    let read = Read {
        threads: 2,
        share: Share::Everything,
        ..Read::default()
    };
    let checked = vmm.run(read.clone()).unwrap().checked;
    assert_eq!((checked.pages, checked.mismatches), (8, 0), "{checked:?}");
    assert_eq!(MemoryUse::of(vmm.pid()).unwrap().hugetlb_bytes, 8 << 20);
    vmm.run(Remove::range(1..3)).unwrap();
    vmm.run(Write {
        pages: Pages::range(2..4),
        generation: some(1),
        threads: 1,
    })
    .unwrap();
    let checked = vmm.run(read).unwrap().checked;
    assert_eq!(checked.mismatches, 0, "{checked:?}");
    vmm.kill().unwrap();
    drop(reserved);
}
