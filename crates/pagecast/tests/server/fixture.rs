//! What every test of the server needs: a template, a server, forks of it.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecast::Template;
use pagecast::server::{Builder, Deadlines, Fork, ForkOptions, ForkState, ForkStatus, Server};
use pagecast_testkit::process::own_fds;
use pagecast_testkit::sim_vmm::{Connect, Job, Order, Pages, Read, ReadReport, Remove, Share, SimVmm, Write};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};
use rustix::time::{ClockId, clock_gettime};

use crate::scripted_source::{Access, Script, ScriptedSource};

/// Long enough for anything that works, on a busy machine; reached only where something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A server, one template, and a folder for sockets.
pub(crate) struct Fixture {
    // Before the folder that its sockets are in, and before the template.
    pub(crate) server: Server,
    pub(crate) template: Template,
    pub(crate) file: TemplateFile,
    pub(crate) folder: tempfile::TempDir,
}

impl Fixture {
    /// A template of 8 MiB with zero pages and a hole, and a server with two workers.
    pub(crate) fn new() -> Self {
        Self::with(8 << 20, |builder| builder)
    }

    pub(crate) fn with(size: u64, set_up: impl FnOnce(Builder) -> Builder) -> Self {
        let file = TemplateFile::create(model(size)).unwrap();
        let template = Template::open(file.path()).unwrap();
        let server = set_up(Server::builder().workers(2)).start().unwrap();
        Self {
            server,
            template,
            file,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// The same file and server, but the template's bytes come as `script` says.
    pub(crate) fn scripted(script: Script, set_up: impl FnOnce(Builder) -> Builder) -> (Self, Arc<Script>) {
        let script = Arc::new(script);
        let fixture = Self {
            template: Template::from_source(Arc::new(ScriptedSource(Arc::clone(&script)))),
            ..Self::with(8 << 20, set_up)
        };
        (fixture, script)
    }

    /// Registers a fork.
    pub(crate) fn register(&self, id: &str) -> Fork {
        self.register_with(id, |options| options)
    }

    /// Registers a fork with something other than usual.
    pub(crate) fn register_with(&self, id: &str, change: impl FnOnce(ForkOptions) -> ForkOptions) -> Fork {
        let options = change(ForkOptions::new(self.folder.path().join(id)));
        self.server
            .register(id.parse().unwrap(), &self.template, &options)
            .unwrap()
    }

    /// Registers a fork with something other than usual, and connects a simulated VMM.
    pub(crate) fn fork_as(&self, id: &str, change: impl FnOnce(ForkOptions) -> ForkOptions) -> (Fork, SimVmm) {
        let fork = self.register_with(id, change);
        self.connect(fork, |connect| connect)
    }

    /// Registers a fork and connects a simulated VMM to it, as Firecracker does.
    pub(crate) fn fork(&self, id: &str) -> (Fork, SimVmm) {
        self.fork_with(id, |connect| connect)
    }

    /// The same, with a VMM that does something other than usual.
    pub(crate) fn fork_with(&self, id: &str, change: impl FnOnce(Connect) -> Connect) -> (Fork, SimVmm) {
        let fork = self.register(id);
        self.connect(fork, change)
    }

    fn connect(&self, fork: Fork, change: impl FnOnce(Connect) -> Connect) -> (Fork, SimVmm) {
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(change(Connect::new(fork.socket_path(), self.file.model())))
            .unwrap();
        let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
        assert_eq!(status.state, ForkState::Serving, "{status:?}");
        // So that it is not among the file descriptors that are open from now on.
        eventually("its socket is closed", || !is_listening(fork.socket_path()));
        (fork, vmm)
    }
}

/// Whether some process listens at this path.
fn is_listening(path: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    sockets.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(3) == Some(&ACCEPTS) && fields.get(7).map(Path::new) == Some(path)
    })
}

/// What the fixture's template holds, where it has so many bytes.
pub(crate) fn model(size: u64) -> TemplateModel {
    TemplateModel {
        size,
        seed: 1,
        layout: Layout {
            zero_every: NonZeroU64::new(7),
            // One that is too short to be given back to the kernel.
            holes: vec![100..200, 300..308, 1000..1024],
        },
    }
}

/// Deadlines for tests that wait for them.
pub(crate) fn short_deadlines() -> Deadlines {
    Deadlines {
        // Well-behaved VMMs still meet them, also on a busy machine.
        connect: Duration::from_secs(2),
        handshake: Duration::from_secs(1),
        ..Deadlines::default()
    }
}

/// What a server under attack has to hold on to: a fork that is served well while another is refused or killed.
pub(crate) struct Bystander {
    fork: Fork,
    vmm: SimVmm,
}

impl Bystander {
    /// A fork that has read a part of its memory.
    pub(crate) fn new(fixture: &Fixture) -> Self {
        let (fork, vmm) = fixture.fork("bystander");
        let bystander = Self { fork, vmm };
        bystander.read(Pages::range(0..64));
        bystander
    }

    /// Has it read all its memory, most of it for the first time.
    pub(crate) fn check_unharmed(&self) {
        self.read(Pages::ALL);
        let status = self.fork.status();
        assert_eq!(status.state, ForkState::Serving, "{status:?}");
    }

    fn read(&self, pages: Pages) {
        let read = Read {
            pages,
            ..Read::default()
        };
        let report = self.vmm.run(read).unwrap();
        assert_eq!(report.checked.mismatches, 0, "{report:?}");
    }
}

/// How many pages of a fork were asked for, installed around those, or are filled in by the kernel.
pub(crate) fn asked_or_given_back(status: &ForkStatus) -> u64 {
    status.stats.faults.demand + status.stats.faults.around + given_back(status)
}

/// How many pages of a fork the kernel fills in by itself: its long runs of zeros.
pub(crate) fn given_back(status: &ForkStatus) -> u64 {
    status.stats.given_back_bytes / 4096
}

/// The code of the reason why a fork failed.
pub(crate) fn failed_with(status: &ForkStatus) -> &'static str {
    assert_eq!(status.state, ForkState::Failed, "{status:?}");
    status.reason.as_ref().unwrap().code()
}

/// Waits for something that nobody reports.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The processor time that this process, and so the server in it, uses while nothing happens for so long.
pub(crate) fn cpu_time_over(window: Duration) -> Duration {
    // Opens no file, because some tests leave none to open.
    let used = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap();
    let before = used();
    std::thread::sleep(window);
    used().saturating_sub(before)
}

/// The open file descriptors of this process, and so of the server in it, by number. Waits while the server reads files of the
/// kernel, as it does soon after a handshake.
pub(crate) fn fds_at_rest() -> BTreeMap<i32, String> {
    let mut open = BTreeMap::new();
    eventually("no file of the kernel is read", || {
        open = own_fds().unwrap();
        let of_kernel = |target: &str| target.starts_with("/proc/") || target.starts_with("/sys/");
        // This one stays open.
        open.values()
            .all(|target| target == "/proc/loadavg" || !of_kernel(target))
    });
    open
}

/// How many open file descriptors of each kind this process has at rest: sockets, userfaultfds, pidfds and all else but pipes,
/// which are ours to speak with VMMs.
pub(crate) fn open_fds() -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for target in fds_at_rest().into_values() {
        // What follows is a number of its own: `socket:[4711]`.
        let kind = target.split_once(":[").map_or(&*target, |(kind, _)| kind);
        if kind != "pipe" {
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
    }
    kinds
}

/// How many processes the server in this process has a pidfd of: those in their handshake, and those that are served.
pub(crate) fn known_peers() -> usize {
    held("pidfd")
}

/// How many userfaultfds the server in this process has.
pub(crate) fn held_uffds() -> usize {
    held("[userfaultfd]")
}

fn held(kind: &str) -> usize {
    own_fds()
        .unwrap()
        .values()
        .filter(|target| target.contains(kind))
        .count()
}

/// Waits until just these file descriptors are open: what peers have sent is closed soon, but not at once.
#[track_caller]
pub(crate) fn assert_open(expected: &BTreeMap<String, usize>) {
    let until = Instant::now() + PATIENCE;
    while open_fds() != *expected {
        assert!(Instant::now() < until, "{:?} is open, not {expected:?}", open_fds());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reads pages `first..end`, as the template's.
pub(crate) fn read_range(first: u64, end: u64) -> Read {
    Read {
        pages: Pages::range(first..end),
        ..Read::default()
    }
}

/// Four threads that each read all there is, in an order of their own.
pub(crate) fn read_everything(seed: u64) -> Read {
    Read {
        threads: 4,
        order: Order::Random(seed),
        share: Share::Everything,
        ..Read::default()
    }
}

/// Has a VMM read, and every byte be right.
pub(crate) fn assert_reads_right(vmm: &SimVmm, read: Read) {
    let report = vmm.run(read).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

/// The same of a read that was begun before.
pub(crate) fn assert_right(read: Job<ReadReport>) {
    let report = read.join_within(PATIENCE).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

/// Reads all, writes, gives back, reads all again.
pub(crate) fn assert_lives_on(vmm: &SimVmm) {
    assert_reads_right(vmm, Read::default());
    let pages = Pages::range(300..600);
    let generation = NonZeroU32::MIN;
    vmm.run(Write {
        pages,
        generation,
        threads: 2,
    })
    .unwrap();
    vmm.run(Remove::range(500..700)).unwrap();
    assert_reads_right(vmm, Read::default());
}

/// A fork whose template is stuck from the middle on.
pub(crate) fn half_stuck() -> (Fixture, Arc<Script>, Fork, SimVmm) {
    let script = Script::new(&model(8 << 20), |page| match page {
        1024.. => Access::Gated,
        _ => Access::Ready,
    });
    let (fixture, script) = Fixture::scripted(script, |builder| builder.workers(1));
    let (fork, vmm) = fixture.fork("a");
    (fixture, script, fork, vmm)
}

/// A fork of a template that takes no room on a disk.
pub(crate) fn big_fork(fixture: &Fixture, model: &TemplateModel) -> (Fork, SimVmm) {
    let script = Script::new(model, |_| Access::Ready);
    let template = Template::from_source(Arc::new(ScriptedSource(Arc::new(script))));
    let options = ForkOptions::new(fixture.folder.path().join("big"));
    let fork = fixture
        .server
        .register("big".parse().unwrap(), &template, &options)
        .unwrap();
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(fork.socket_path(), model)).unwrap();
    fork.wait(PATIENCE, |state| state == ForkState::Serving);
    (fork, vmm)
}

/// A template larger than the memory that is left.
pub(crate) fn too_big() -> TemplateModel {
    let available = procfs::Current::current()
        .map(|info: procfs::Meminfo| info.mem_available.unwrap())
        .unwrap();
    let size = (available + available / 2).next_multiple_of(2 << 20);
    TemplateModel::of_data(size, 1)
}
