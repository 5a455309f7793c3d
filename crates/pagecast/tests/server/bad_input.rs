//! What bad input gets: a clear refusal, its connection closed, nothing left behind, and nobody else notices.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use pagecast::Template;
use pagecast::server::{Builder, Deadlines, Error, Fork, ForkOptions, ForkState, ForkStatus};
use pagecast_testkit::peer::{Bytes, FdKind, Piece, RawHandshake, RawReport, Then};
use pagecast_testkit::sim_vmm::{
    AwaitClose, ClearNonblock, Connect, Order, Pages, Read, Region, Registered, SimVmm, Touch, TouchOutside,
};
use pagecast_testkit::skip::{Need, skip};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use pagecast_uffd::Features;
use serde_json::{Value, json};

use crate::fixture::{
    Bystander, Fixture, PATIENCE, assert_open, cpu_time_over, eventually, failed_with, held_uffds, open_fds,
    short_deadlines,
};

/// The template's size in bytes.
const SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Where raw peers say that their memory is. Nothing is mapped there.
const BASE: u64 = 0x7f00_0000_0000;
/// The user whom forks are registered for where it matters who connects.
const USER: u32 = 54321;

/// Handshakes may take as long as a busy machine makes them, so that no fork of the test fails for that.
fn patient(builder: Builder) -> Builder {
    builder.deadlines(Deadlines {
        connect: PATIENCE,
        handshake: PATIENCE,
        fault: PATIENCE,
    })
}

/// A server with a fork that is served well, and one that somebody bad is about to connect to.
struct Scene {
    fixture: Fixture,
    bystander: Bystander,
    vmm: SimVmm,
    fork: Fork,
    /// File descriptors that were open before the fork was registered.
    fds: BTreeMap<String, usize>,
}

impl Scene {
    fn new(set_up: impl FnOnce(Builder) -> Builder) -> Self {
        Self::with(set_up, SimVmm::spawn().unwrap(), |options| options)
    }

    fn with(
        set_up: impl FnOnce(Builder) -> Builder,
        vmm: SimVmm,
        options: impl FnOnce(ForkOptions) -> ForkOptions,
    ) -> Self {
        let fixture = Fixture::with(SIZE, set_up);
        let bystander = Bystander::new(&fixture);
        let fds = open_fds();
        let options = options(ForkOptions::new(fixture.folder.path().join("bad")));
        let fork = fixture
            .server
            .register("bad".parse().unwrap(), &fixture.template, &options)
            .unwrap();
        Self {
            fixture,
            bystander,
            vmm,
            fork,
            fds,
        }
    }

    /// Waits until the fork has failed for this reason, and makes sure that nothing of it is left but that.
    fn check_failed(&self, code: &str) -> ForkStatus {
        let status = self.fork.wait(PATIENCE, ForkState::is_end);
        assert_eq!(failed_with(&status), code, "{status:?}");
        let failures: Vec<_> = self.fixture.server.failures().into_iter().collect();
        assert_eq!(failures, [(code, 1)]);
        eventually("its socket is gone", || !self.fork.socket_path().exists());
        assert_open(&self.fds);
        self.bystander.check_unharmed();
        status
    }

    /// Waits until a connection was refused for this reason, makes sure that the fork waits on and that nothing else has
    /// come of it, and serves a VMM.
    fn check_waits_on(&self, code: &str) {
        eventually("it is refused", || self.fork.refusals().get(code) == Some(&1));
        let status = self.fork.status();
        assert_eq!((status.state, status.pid), (ForkState::Waiting, None), "{status:?}");
        assert!(self.fixture.server.failures().is_empty());
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(Connect::new(self.fork.socket_path(), self.fixture.file.model()))
            .unwrap();
        let report = vmm.run(Read::default()).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
        self.bystander.check_unharmed();
    }

    fn check_refused(&self, code: &str, report: RawReport) -> ForkStatus {
        assert!(report.closed_after_us.is_some(), "its connection is closed: {report:?}");
        self.check_failed(code)
    }
}

/// Whoever does `handshake` is refused for the reason with this code.
fn refused(code: &str, handshake: impl FnOnce(&Path) -> RawHandshake) -> ForkStatus {
    refused_by(patient, code, handshake)
}

fn refused_by(
    set_up: impl FnOnce(Builder) -> Builder,
    code: &str,
    handshake: impl FnOnce(&Path) -> RawHandshake,
) -> ForkStatus {
    let scene = Scene::new(set_up);
    let report = scene.vmm.run(handshake(scene.fork.socket_path())).unwrap();
    scene.check_refused(code, report)
}

/// A peer that does `handshake`, which has no file descriptor, is refused for the reason with this code, and its fork waits on.
fn refused_without_fd(
    set_up: impl FnOnce(Builder) -> Builder,
    code: &str,
    handshake: impl FnOnce(&Path) -> RawHandshake,
) {
    let scene = Scene::new(set_up);
    let report = scene.vmm.run(handshake(scene.fork.socket_path())).unwrap();
    assert!(report.closed_after_us.is_some(), "its connection is closed: {report:?}");
    scene.check_waits_on(code);
}

/// A userfaultfd with this message is refused for the reason with this code.
fn message_refused(code: &str, message: impl AsRef<[u8]>) -> String {
    let status = refused(code, |socket| RawHandshake::new(socket, message, &[FdKind::Uffd]));
    pagecast::server::chain(&**status.reason.as_ref().unwrap())
}

/// These regions are refused for the reason with this code. Returns the reason in words.
fn regions_refused(code: &str, regions: &[Value]) -> String {
    message_refused(code, Value::from(regions).to_string())
}

fn region(base: u64, size: u64, offset: u64, page_size: u64) -> Value {
    json!({
        "base_host_virt_addr": base, "size": size, "offset": offset, "page_size": page_size, "page_size_kib": page_size
    })
}

/// A message that would be served.
fn good_message() -> String {
    Value::from(vec![region(BASE, SIZE, 0, PAGE)]).to_string()
}

/// A VMM that does all that Firecracker does, except for this, is refused for the reason with this code.
fn vmm_refused(code: &str, change: impl FnOnce(&mut Connect)) {
    let scene = Scene::new(patient);
    let mut connect = Connect::new(scene.fork.socket_path(), scene.fixture.file.model());
    change(&mut connect);
    scene.vmm.run(connect).unwrap();
    let within_ms = u64::try_from(PATIENCE.as_millis()).unwrap();
    let closed = scene.vmm.run(AwaitClose { within_ms }).unwrap();
    assert!(closed.after_us.is_some(), "its connection is closed");
    scene.check_failed(code);
}

#[test]
fn what_the_others_get_refused_for_is_not_the_message_that_they_start_from() {
    let scene = Scene::new(patient);
    let handshake = RawHandshake::new(scene.fork.socket_path(), good_message(), &[FdKind::Uffd]);
    let _connection = scene.vmm.start(handshake).unwrap();
    let status = scene.fork.wait(PATIENCE, |state| state != ForkState::Waiting);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
    scene.bystander.check_unharmed();
}

// File descriptors.

#[test]
fn no_fd_is_refused() {
    refused_without_fd(patient, "no_fd", |socket| {
        RawHandshake::new(socket, good_message(), &[])
    });
}

#[test]
fn two_fds_are_refused() {
    refused("too_many_fds", |socket| {
        RawHandshake::new(socket, good_message(), &[FdKind::Uffd, FdKind::Uffd])
    });
}

#[test]
fn two_fds_one_after_the_other_are_refused() {
    let piece = |bytes: &str, fd| Piece {
        bytes: Bytes::from(bytes.as_bytes()),
        fds: vec![fd],
    };
    refused("too_many_fds", |socket| RawHandshake {
        pieces: vec![piece("[", FdKind::Uffd), piece("{", FdKind::DevNull)],
        ..RawHandshake::silent(socket)
    });
}

#[test]
fn as_many_fds_as_a_message_can_carry_are_refused() {
    refused("too_many_fds", |socket| {
        RawHandshake::new(socket, good_message(), &[FdKind::DevNull; 253])
    });
}

#[test]
fn a_device_is_refused() {
    refused("not_a_uffd", |socket| {
        RawHandshake::new(socket, good_message(), &[FdKind::DevNull])
    });
}

#[test]
fn a_pipe_is_refused() {
    refused("not_a_uffd", |socket| {
        RawHandshake::new(socket, good_message(), &[FdKind::Pipe])
    });
}

#[test]
fn a_memfd_is_refused() {
    refused("not_a_uffd", |socket| {
        RawHandshake::new(socket, good_message(), &[FdKind::Memfd])
    });
}

#[test]
fn a_uffd_that_nobody_has_set_up_is_refused() {
    refused("not_a_uffd", |socket| {
        RawHandshake::new(socket, good_message(), &[FdKind::UffdWithoutApi])
    });
}

#[test]
fn a_uffd_that_hides_removals_is_refused() {
    vmm_refused("features", |connect| connect.feature_bits = 0);
}

#[test]
fn a_uffd_that_reports_forks_is_refused() {
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to have fork events"));
        return;
    }
    vmm_refused("features", |connect| {
        connect.feature_bits |= Features::EVENT_FORK.bits();
    });
}

#[test]
fn a_uffd_that_reports_moved_memory_is_refused() {
    vmm_refused("features", |connect| {
        connect.feature_bits |= Features::EVENT_REMAP.bits();
    });
}

#[test]
fn a_uffd_that_reports_unmapped_memory_is_refused() {
    vmm_refused("features", |connect| {
        connect.feature_bits |= Features::EVENT_UNMAP.bits();
    });
}

#[test]
fn a_uffd_that_raises_sigbus_is_refused() {
    vmm_refused("features", |connect| {
        connect.feature_bits |= Features::SIGBUS.bits();
    });
}

/// The kernel registers memory for write protection without any feature, and others may ask for the features and not use
/// them: what is registered counts.
#[test]
fn a_vmm_that_tracks_writes_by_write_protection_is_refused_with_the_reason() {
    for features in [
        Features::EVENT_REMOVE,
        Features::EVENT_REMOVE | Features::PAGEFAULT_FLAG_WP | Features::WP_ASYNC | Features::WP_UNPOPULATED,
    ] {
        vmm_refused("write_protected", |connect| {
            connect.feature_bits = features.bits();
            connect.registered = Registered::WriteProtected;
        });
    }
}

#[test]
fn a_vmm_that_tracks_writes_in_its_second_region_is_refused_too() {
    vmm_refused("write_protected", |connect| {
        connect.registered = Registered::WriteProtected;
        let half = |offset| Region { size: SIZE / 2, offset };
        connect.regions = vec![half(0), half(SIZE / 2)];
    });
}

#[test]
fn a_vmm_that_may_protect_its_memory_and_does_not_is_served() {
    let scene = Scene::new(patient);
    let mut connect = Connect::new(scene.fork.socket_path(), scene.fixture.file.model());
    connect.feature_bits |= (Features::PAGEFAULT_FLAG_WP | Features::WP_ASYNC | Features::WP_UNPOPULATED).bits();
    scene.vmm.run(connect).unwrap();
    let report = scene.vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
    assert_eq!(scene.fork.status().state, ForkState::Serving);
}

// How the message comes.

fn hasty(builder: Builder) -> Builder {
    builder.deadlines(short_deadlines())
}

fn hasty_handshake(builder: Builder) -> Builder {
    builder.deadlines(Deadlines {
        handshake: short_deadlines().handshake,
        ..Deadlines::default()
    })
}

#[test]
fn a_connection_that_says_nothing_is_closed_at_the_deadline() {
    refused_without_fd(hasty_handshake, "handshake_deadline", |socket| {
        RawHandshake::silent(socket)
    });
}

#[test]
fn a_message_that_stops_in_the_middle_is_refused_at_the_deadline() {
    refused_by(hasty, "handshake_deadline", |socket| {
        RawHandshake::new(socket, &good_message()[..40], &[FdKind::Uffd])
    });
}

#[test]
fn a_message_that_trickles_in_past_the_deadline_is_refused() {
    let message = [b' '; 1 << 10];
    refused_without_fd(hasty_handshake, "handshake_deadline", |socket| RawHandshake {
        pause_ms: 50,
        ..RawHandshake::new(socket, message, &[]).in_pieces_of(1)
    });
}

#[test]
fn a_fork_that_nobody_connects_to_fails_at_the_deadline() {
    let scene = Scene::new(hasty);
    scene.check_failed("connect_deadline");
}

#[test]
fn a_message_in_pieces_of_one_byte_is_served() {
    let scene = Scene::new(patient);
    let connect = Connect {
        byte_by_byte: true,
        ..Connect::new(scene.fork.socket_path(), scene.fixture.file.model())
    };
    scene.vmm.run(connect).unwrap();
    let report = scene.vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
    assert_eq!(scene.fork.status().state, ForkState::Serving);
    scene.bystander.check_unharmed();
}

#[test]
fn a_message_in_pieces_with_pauses_between_them_is_served() {
    let scene = Scene::new(patient);
    let handshake = RawHandshake {
        pause_ms: 1,
        ..RawHandshake::new(scene.fork.socket_path(), good_message(), &[FdKind::Uffd]).in_pieces_of(1)
    };
    let _connection = scene.vmm.start(handshake).unwrap();
    let status = scene.fork.wait(PATIENCE, |state| state != ForkState::Waiting);
    assert_eq!(status.state, ForkState::Serving, "{status:?}");
}

#[test]
fn a_message_that_never_ends_is_refused() {
    refused("message_too_long", |socket| RawHandshake {
        then: Then::RepeatLast,
        ..RawHandshake::new(socket, [b'['; 4096], &[FdKind::Uffd])
    });
}

#[test]
fn a_message_that_never_begins_is_refused() {
    refused("message_too_long", |socket| RawHandshake {
        then: Then::RepeatLast,
        ..RawHandshake::new(socket, [b' '; 4096], &[FdKind::Uffd])
    });
}

#[test]
fn a_message_that_is_cut_off_is_refused() {
    let scene = Scene::new(patient);
    let handshake = RawHandshake {
        then: Then::Close,
        ..RawHandshake::new(scene.fork.socket_path(), &good_message()[..40], &[FdKind::Uffd])
    };
    scene.vmm.run(handshake).unwrap();
    scene.check_failed("hung_up");
}

#[test]
fn a_vmm_that_dies_in_its_handshake_is_noticed() {
    let scene = Scene::new(patient);
    let handshake = RawHandshake::new(scene.fork.socket_path(), &good_message()[..40], &[FdKind::Uffd]);
    let _connection = scene.vmm.start(handshake).unwrap();
    // The bystander's is the other.
    eventually("the server takes its userfaultfd", || held_uffds() == 2);
    scene.vmm.kill().unwrap();
    scene.check_failed("hung_up");
}

#[test]
fn trailing_garbage_is_refused() {
    message_refused("message_framing", good_message() + " and more");
}

#[test]
fn two_messages_in_one_are_refused() {
    message_refused("message_framing", good_message() + &good_message());
}

#[test]
fn what_does_not_begin_like_a_message_is_refused() {
    message_refused("message_framing", "GET / HTTP/1.1\r\n\r\n");
}

#[test]
fn invalid_utf8_is_refused() {
    message_refused("message_not_utf8", b"[{\"name\":\"\xff\xfe\"}]");
}

#[test]
fn invalid_json_is_refused() {
    message_refused("message_not_json", r#"[{"base_host_virt_addr":,}]"#);
}

#[test]
fn brackets_that_do_not_match_are_refused() {
    message_refused("message_not_json", r"[{]}");
}

#[test]
fn lists_in_lists_in_lists_are_refused() {
    let depth = 100_000;
    message_refused("message_not_json", "[".repeat(depth) + &"]".repeat(depth));
}

#[test]
fn numbers_that_are_no_addresses_are_refused() {
    message_refused(
        "message_not_json",
        good_message().replace(&BASE.to_string(), "18446744073709551616"),
    );
    message_refused("message_not_json", good_message().replace(&BASE.to_string(), "-4096"));
}

// What the message says.

#[test]
fn an_empty_list_is_refused() {
    regions_refused("no_regions", &[]);
    message_refused("no_regions", r#"{"mappings":[]}"#);
}

#[test]
fn a_hundred_thousand_regions_are_refused() {
    let regions: Vec<_> = (0..100_000)
        .map(|n| region(BASE + n * PAGE, PAGE, n * PAGE, PAGE))
        .collect();
    regions_refused("message_too_long", &regions);
}

#[test]
fn more_regions_than_any_vmm_has_are_refused() {
    let regions: Vec<_> = (0..1025)
        .map(|n| region(BASE + n * PAGE, PAGE, n * PAGE, PAGE))
        .collect();
    regions_refused("too_many_regions", &regions);
}

#[test]
fn an_unaligned_address_is_refused() {
    let why = regions_refused("unaligned", &[region(BASE + 8, SIZE, 0, PAGE)]);
    assert!(why.contains("base_host_virt_addr"), "{why}");
}

#[test]
fn an_unaligned_size_is_refused() {
    let why = regions_refused("unaligned", &[region(BASE, SIZE - 1, 0, PAGE)]);
    assert!(why.contains("size 0xfffff "), "{why}");
}

#[test]
fn an_unaligned_offset_is_refused() {
    let why = regions_refused("unaligned", &[region(BASE, PAGE, 512, PAGE)]);
    assert!(why.contains("offset"), "{why}");
}

#[test]
fn an_empty_region_is_refused() {
    regions_refused(
        "empty_region",
        &[region(BASE, SIZE, 0, PAGE), region(BASE - PAGE, 0, 0, PAGE)],
    );
}

#[test]
fn a_page_size_of_zero_is_refused() {
    regions_refused("page_size", &[region(BASE, SIZE, 0, 0)]);
}

#[test]
fn a_page_size_of_three_is_refused() {
    regions_refused("page_size", &[region(BASE, SIZE, 0, 3)]);
}

#[test]
fn a_page_size_of_a_gibibyte_is_refused() {
    regions_refused("page_size", &[region(BASE, 1 << 30, 0, 1 << 30)]);
}

#[test]
fn page_sizes_that_contradict_each_other_are_refused() {
    let mut region = region(BASE, SIZE, 0, PAGE);
    region["page_size_kib"] = json!(4);
    regions_refused("page_size", &[region]);
}

#[test]
fn regions_that_overlap_in_memory_are_refused() {
    let regions = [
        region(BASE, SIZE / 2, 0, PAGE),
        region(BASE + SIZE / 2 - PAGE, SIZE / 2, SIZE / 2, PAGE),
    ];
    regions_refused("overlap_in_memory", &regions);
}

#[test]
fn regions_that_overlap_in_the_template_are_refused() {
    let regions = [
        region(BASE, SIZE / 2, 0, PAGE),
        region(BASE + SIZE, SIZE / 2, SIZE / 2 - PAGE, PAGE),
    ];
    regions_refused("overlap_in_template", &regions);
}

#[test]
fn a_region_past_the_end_of_the_template_is_refused() {
    regions_refused("past_the_end", &[region(BASE, SIZE, PAGE, PAGE)]);
}

#[test]
fn an_offset_that_overflows_is_refused() {
    regions_refused("past_the_end", &[region(BASE, 2 * PAGE, u64::MAX - PAGE + 1, PAGE)]);
}

#[test]
fn an_address_that_overflows_is_refused() {
    regions_refused("address_overflow", &[region(u64::MAX - PAGE + 1, 2 * PAGE, 0, PAGE)]);
}

#[test]
fn a_guest_larger_than_its_template_is_refused() {
    vmm_refused("past_the_end", |connect| {
        connect.regions = vec![Region {
            size: 2 * SIZE,
            offset: 0,
        }];
    });
}

// Who connects.

#[test]
fn the_wrong_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to register forks for other users"));
        return;
    }
    let vmm = SimVmm::spawn().unwrap();
    let scene = Scene::with(patient, vmm, |options| options.user(USER));
    // Root can connect to anybody's socket, but is not whom this one is for.
    let handshake = RawHandshake::new(scene.fork.socket_path(), good_message(), &[FdKind::Uffd]);
    let report = scene.vmm.run(handshake).unwrap();
    assert!(report.closed_after_us.is_some(), "its connection is closed: {report:?}");
    eventually("it is refused", || scene.fork.refusals().get("wrong_user") == Some(&1));
    assert_eq!(scene.fork.status().state, ForkState::Waiting);
    scene.bystander.check_unharmed();
}

#[test]
fn the_user_whom_a_fork_is_for_is_served() {
    let own = rustix::process::geteuid().as_raw();
    let scene = Scene::with(patient, SimVmm::spawn().unwrap(), |options| options.user(own));
    let connect = Connect::new(scene.fork.socket_path(), scene.fixture.file.model());
    scene.vmm.run(connect).unwrap();
    let report = scene.vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

/// A scene whose fork is for [`USER`] and whose VMM runs as `uid`; `None` where that cannot be.
fn scene_of(uid: u32) -> Option<Scene> {
    if !rustix::process::geteuid().is_root() {
        skip((Need::Root, "to start processes of other users"));
        return None;
    }
    match SimVmm::spawn_as(uid) {
        Ok(vmm) => {
            let scene = Scene::with(patient, vmm, |options| options.user(USER));
            let folder = scene.fixture.folder.path();
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711)).unwrap();
            Some(scene)
        }
        Err(error) => {
            skip(&format!("{error:#}"));
            None
        }
    }
}

#[test]
fn another_user_is_let_in_where_the_fork_is_for_them() {
    let Some(scene) = scene_of(USER) else { return };
    // That this is what it is refused for shows that its user is not.
    let handshake = RawHandshake::new(scene.fork.socket_path(), good_message(), &[FdKind::DevNull]);
    let report = scene.vmm.run(handshake).unwrap();
    scene.check_refused("not_a_uffd", report);
}

#[test]
fn another_user_is_served_where_the_fork_is_for_them() {
    let Some(scene) = scene_of(USER) else { return };
    let connect = Connect::new(scene.fork.socket_path(), scene.fixture.file.model());
    if let Err(error) = scene.vmm.run(connect) {
        let error = format!("{error:#}");
        assert!(error.contains("no userfaultfd"), "{error}");
        skip(&error);
        return;
    }
    let report = scene.vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
    scene.bystander.check_unharmed();
}

#[test]
fn other_users_cannot_even_connect() {
    let Some(scene) = scene_of(USER + 1) else { return };
    let handshake = RawHandshake::new(scene.fork.socket_path(), good_message(), &[]);
    let error = scene.vmm.run(handshake).unwrap_err();
    assert!(format!("{error:#}").contains("Permission denied"), "{error:#}");
    assert_eq!(scene.fork.status().state, ForkState::Waiting);
    scene.bystander.check_unharmed();
}

// What a VMM does once it is served.

/// A VMM that is served and then misbehaves is killed for the reason with this code.
fn killed_for(code: &str, misbehave: impl FnOnce(&SimVmm)) {
    let scene = Scene::new(patient);
    let connect = Connect::new(scene.fork.socket_path(), scene.fixture.file.model());
    scene.vmm.run(connect).unwrap();
    scene.vmm.run(touch(0..16)).unwrap();
    misbehave(&scene.vmm);
    let status = scene.vmm.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "{status:?}");
    let status = scene.check_failed(code);
    assert!(
        status.stats.faults.demand + status.stats.faults.around >= 16,
        "its numbers stay: {status:?}"
    );
    check_idle();
}

fn touch(pages: std::ops::Range<u64>) -> Touch {
    Touch {
        pages: Pages::range(pages),
        threads: 1,
        order: Order::Sequential,
    }
}

/// A server that nobody wants anything of does nothing.
fn check_idle() {
    let window = Duration::from_millis(500);
    let used = cpu_time_over(window);
    assert!(used < window / 4, "{used:?} of processor time in {window:?}");
}

#[test]
fn a_fault_outside_every_region_kills_its_vmm_and_nobody_else() {
    killed_for("fault_outside", |vmm| {
        let touching = vmm.start(TouchOutside).unwrap();
        assert!(touching.join().is_err(), "it got no page");
    });
}

#[test]
fn a_uffd_made_blocking_kills_its_vmm_and_nobody_else() {
    killed_for("blocking", |vmm| {
        // The kernel tells nobody before the next fault, unless the server is just looking: then this is its end already.
        let _ = vmm.run(ClearNonblock);
        check_idle();
        // Far from all that was touched, so that it is not there yet.
        let touched = vmm.run(touch(200..201));
        assert!(touched.is_err(), "it got no page");
    });
}

// Templates that do not stay what they were.

/// A template of its own for a test that spoils it, on the server of a bystander.
fn other_template(scene: &Fixture) -> (TemplateFile, Template) {
    let file = TemplateFile::create_at(&scene.folder.path().join("template"), TemplateModel::of_data(SIZE, 2)).unwrap();
    let template = Template::open(file.path()).unwrap();
    (file, template)
}

fn truncate(file: &TemplateFile) {
    let file = std::fs::File::options().write(true).open(file.path()).unwrap();
    file.set_len(SIZE / 2).unwrap();
}

#[test]
fn a_template_truncated_while_it_is_forked_kills_its_forks_and_no_others() {
    let fixture = Fixture::with(SIZE, patient);
    let bystander = Bystander::new(&fixture);
    let (file, template) = other_template(&fixture);
    let options = ForkOptions::new(fixture.folder.path().join("victim"));
    let fork = fixture
        .server
        .register("victim".parse().unwrap(), &template, &options)
        .unwrap();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fork.socket_path(), file.model())).unwrap();
    vmm.run(touch(0..16)).unwrap();
    truncate(&file);
    // Past the end and not: neither is what it was.
    let job = vmm.start(Read::default()).unwrap();
    assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    assert!(job.join().is_err(), "it got no answer");
    let status = fork.wait(PATIENCE, ForkState::is_end);
    let code = failed_with(&status);
    assert!(["template_changed", "template_truncated"].contains(&code), "{status:?}");
    bystander.check_unharmed();
}

#[test]
fn a_template_that_has_changed_is_not_forked_again() {
    let fixture = Fixture::with(SIZE, patient);
    let bystander = Bystander::new(&fixture);
    let (file, template) = other_template(&fixture);
    let options = ForkOptions::new(fixture.folder.path().join("early"));
    let early = fixture
        .server
        .register("early".parse().unwrap(), &template, &options)
        .unwrap();
    truncate(&file);
    // Registered before, connected after.
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(early.socket_path(), file.model())).unwrap();
    assert_eq!(
        failed_with(&early.wait(PATIENCE, ForkState::is_end)),
        "template_changed"
    );
    // Registered after.
    let options = ForkOptions::new(fixture.folder.path().join("late"));
    let late = fixture.server.register("late".parse().unwrap(), &template, &options);
    assert!(matches!(late, Err(Error::Template(_))), "{late:?}");
    assert!(!fixture.folder.path().join("late").exists());
    bystander.check_unharmed();
}

// What the server is asked for.

#[test]
fn a_second_fork_of_the_same_name_is_refused_and_the_first_unharmed() {
    let fixture = Fixture::with(SIZE, patient);
    let first = fixture.register("same");
    let path = fixture.folder.path().join("other");
    let options = ForkOptions::new(&path);
    let second = fixture
        .server
        .register("same".parse().unwrap(), &fixture.template, &options);
    assert!(matches!(second, Err(Error::ForkExists(_))), "{second:?}");
    assert!(!path.exists(), "no socket for it");
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(first.socket_path(), fixture.file.model()))
        .unwrap();
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

#[test]
fn a_socket_path_that_cannot_be_one_is_refused_and_its_name_stays_free() {
    let fixture = Fixture::with(SIZE, patient);
    let register = |path: &Path| {
        let options = ForkOptions::new(path);
        fixture
            .server
            .register("fork".parse().unwrap(), &fixture.template, &options)
    };
    let folder = fixture.folder.path();
    let too_long = register(&folder.join("x".repeat(108)));
    assert!(matches!(too_long, Err(Error::SocketPath { .. })), "{too_long:?}");
    let nowhere = register(&folder.join("no/such/folder"));
    assert!(matches!(nowhere, Err(Error::Socket { .. })), "{nowhere:?}");
    let precious = folder.join("precious");
    std::fs::write(&precious, "data").unwrap();
    let taken = register(&precious);
    assert!(matches!(taken, Err(Error::SocketPath { .. })), "{taken:?}");
    assert_eq!(std::fs::read(&precious).unwrap(), b"data");
    // What a server leaves that was killed is in nobody's way.
    let stale = folder.join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let fork = register(&stale).unwrap();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fork.socket_path(), fixture.file.model())).unwrap();
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}
