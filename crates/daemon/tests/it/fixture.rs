//! What every test of the daemon needs: a daemon, a template, VMMs, and somebody who asks.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use pagecast::template::KeptIdentity;
use pagecast_daemon::{Daemon, Settings};
use pagecast_testkit::sim_vmm::{Connect, Job, MapFile, Order, Pages, Read, ReadReport, Share, SimVmm, Write};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::http::{self, Answer};

/// Long enough for anything that works, on a busy machine; reached only where something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// The size of the fixture's template in bytes.
pub(crate) const SIZE: u64 = 8 << 20;

/// A daemon with a run dir of its own, and a mem-file that can be a template.
pub(crate) struct Fixture {
    // In this order: the daemon goes before its runtime, and both before their folder.
    daemon: Option<Daemon>,
    pub(crate) runtime: Runtime,
    settings: Settings,
    pub(crate) file: TemplateFile,
    pub(crate) folder: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::with(|_, _| {})
    }

    /// One with settings of its own; `set` is told the folder that everything is in.
    pub(crate) fn with(set: impl FnOnce(&Path, &mut Settings)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            run_dir: Some(folder.path().join("run")),
            workers: Some(2),
            ..Settings::default()
        };
        set(folder.path(), &mut settings);
        let runtime = runtime();
        Self {
            daemon: Some(start(&runtime, &settings)),
            runtime,
            settings,
            file: TemplateFile::create_at(&folder.path().join("template.mem"), model(SIZE)).unwrap(),
            folder,
        }
    }

    /// Stops the daemon as one signal does, and starts another on the same run dir.
    pub(crate) fn restart(&mut self) {
        self.restart_with(|_| {});
    }

    /// The same, and the other has other settings.
    pub(crate) fn restart_with(&mut self, set: impl FnOnce(&mut Settings)) {
        let daemon = self.daemon.take().unwrap();
        self.runtime.block_on(daemon.close(PATIENCE)).unwrap();
        drop(daemon);
        // Whatever still holds the run dir goes with it.
        drop(std::mem::replace(&mut self.runtime, runtime()));
        set(&mut self.settings);
        self.daemon = Some(start(&self.runtime, &self.settings));
    }

    pub(crate) fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.daemon().control_socket()
    }

    pub(crate) fn run_dir(&self) -> &Path {
        self.settings.run_dir.as_deref().unwrap()
    }

    /// Asks without a body.
    #[track_caller]
    pub(crate) fn ask(&self, method: &str, path: &str) -> Answer {
        http::call(&self.socket(), method, path, b"")
    }

    /// Asks with a body of JSON.
    #[track_caller]
    pub(crate) fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.send_bytes(method, path, body.to_string().as_bytes())
    }

    /// Asks with any body.
    #[track_caller]
    pub(crate) fn send_bytes(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        http::call(&self.socket(), method, path, body)
    }

    /// Adds the mem-file as template `t`.
    #[track_caller]
    pub(crate) fn add_template(&self) -> Value {
        self.send("PUT", "/v1/templates/t", &json!({ "mem_path": self.file.path() }))
            .ok(201)
    }

    /// Waits until the mem-file is so old that its zeros can be kept.
    pub(crate) fn age(&self) {
        let file = std::fs::File::open(self.file.path()).unwrap();
        let changed = KeptIdentity::of(file).unwrap().changed();
        eventually("the clock of its file system has ticked", || {
            changed.elapsed().is_ok_and(|age| age > Duration::from_millis(100))
        });
    }

    #[track_caller]
    pub(crate) fn template(&self) -> Value {
        self.ask("GET", "/v1/templates/t").ok(200)
    }

    /// Makes a fork of template `t`, with these fields beside.
    #[track_caller]
    pub(crate) fn create(&self, fields: &Value) -> Value {
        self.try_create(fields).ok(201)
    }

    #[track_caller]
    pub(crate) fn try_create(&self, fields: &Value) -> Answer {
        let mut body = json!({ "template": "t" });
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        self.send("POST", "/v1/forks", &body)
    }

    /// A fork of `t` with its VMM, which is served.
    #[track_caller]
    pub(crate) fn serving(&self, id: &str, backend: &str) -> SimVmm {
        let vmm = SimVmm::spawn().unwrap();
        let created = match backend {
            "file" => self.create(&json!({ "id": id, "backend": "file", "pid": vmm.pid() })),
            _ => self.create(&json!({ "id": id, "backend": backend })),
        };
        self.restore(&vmm, &created);
        self.await_fork(id, "serving");
        vmm
    }

    /// Has a VMM take the memory that it was told to take.
    #[track_caller]
    pub(crate) fn restore(&self, vmm: &SimVmm, created: &Value) {
        restore(vmm, created, self.file.model());
    }

    #[track_caller]
    pub(crate) fn fork(&self, id: &str) -> Value {
        self.ask("GET", &format!("/v1/forks/{id}")).ok(200)
    }

    /// Waits until a fork is in this state.
    #[track_caller]
    pub(crate) fn await_fork(&self, id: &str, state: &str) -> Value {
        let mut fork = self.fork(id);
        let until = Instant::now() + PATIENCE;
        while fork["state"] != state {
            assert!(Instant::now() < until, "not {state} within {PATIENCE:?}: {fork:#}");
            std::thread::sleep(PACE);
            fork = self.fork(id);
        }
        fork
    }

    /// The names of what is kept in a folder of the run dir.
    pub(crate) fn kept(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.run_dir().join(folder)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Between two looks at something that nobody reports.
const PACE: Duration = Duration::from_millis(5);

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

fn start(runtime: &Runtime, settings: &Settings) -> Daemon {
    let config = settings.clone().resolve().unwrap();
    runtime
        .block_on(Daemon::start(config))
        .unwrap_or_else(|error| panic!("{error:?}"))
}

/// What the fixture's template holds.
pub(crate) fn model(size: u64) -> TemplateModel {
    TemplateModel {
        size,
        seed: 1,
        layout: Layout {
            zero_every: NonZeroU64::new(7),
            holes: vec![100..200, 1000..1024],
        },
    }
}

/// Has a VMM take the memory that it was told to take.
#[track_caller]
pub(crate) fn restore(vmm: &SimVmm, created: &Value, model: &TemplateModel) {
    let path = created["mem_backend"]["backend_path"].as_str().unwrap();
    match created["mem_backend"]["backend_type"].as_str().unwrap() {
        "Uffd" => drop(vmm.run(Connect::new(path, model)).unwrap()),
        "File" => vmm
            .run(MapFile {
                path: path.into(),
                template: model.clone(),
            })
            .unwrap(),
        other => panic!("{other} is no backend of Firecracker"),
    }
}

/// Waits for something that nobody reports.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(PACE);
    }
}

/// Has a VMM read all its memory, and every byte be right.
#[track_caller]
pub(crate) fn reads_right(vmm: &SimVmm) {
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

/// Has a VMM write to some of its pages.
#[track_caller]
pub(crate) fn writes(vmm: &SimVmm) {
    let write = Write {
        pages: Pages::ALL.every(NonZeroU32::new(8).unwrap()),
        generation: NonZeroU32::MIN,
        threads: 2,
    };
    vmm.run(write).unwrap();
}

/// Begins to read everything, again and again, for longer than any test takes.
pub(crate) fn reads_on(vmm: &SimVmm, seed: u64) -> Job<ReadReport> {
    vmm.start(Read {
        threads: 2,
        order: Order::Random(seed),
        share: Share::Everything,
        passes: 1_000_000,
        ..Read::default()
    })
    .unwrap()
}

/// Whether it has died by now.
pub(crate) fn is_dead(vmm: &SimVmm) -> bool {
    let mut exited = [PollFd::new(vmm, PollFlags::IN)];
    rustix::event::poll(&mut exited, Some(&Timespec::default())).unwrap() > 0
}

/// Another process that opens a file for writing, and writes one byte at its beginning.
pub(crate) fn start_writing(path: &Path) -> Child {
    Command::new("sh")
        .args(["-c", r#"printf X 1<>"$0""#])
        .arg(path)
        .spawn()
        .unwrap()
}

/// Waits for the end of a process, which has to come.
#[track_caller]
pub(crate) fn ends_well(mut process: Child) {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return;
        }
        if Instant::now() >= until {
            process.kill().unwrap();
            process.wait().unwrap();
            panic!("still runs after {PATIENCE:?}");
        }
        std::thread::sleep(PACE);
    }
}
