//! A running `pagecast serve`, its log, and a client of it.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use pagecast_client::{AddTemplate, Client, ClientError, CreateFork, CreatedFork, Fork, ForkState};
use pagecast_testkit::sim_vmm::{Connect, MapFile, Read, SimVmm};
use pagecast_testkit::template_file::TemplateModel;
use rustix::process::Signal;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::command::PATIENCE;

/// A daemon in a process of its own. Dropping it kills it.
pub(crate) struct Served {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    /// What it tells whoever has started it, and where it does.
    notified: UnixDatagram,
    _folder: tempfile::TempDir,
    pub(crate) client: Client,
    pub(crate) runtime: Runtime,
}

/// `pagecast serve` with this run dir.
pub(crate) fn serve(run_dir: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagecast"));
    command.args(["serve", "--log-format", "json", "--workers", "2", "--run-dir"]);
    command.arg(run_dir).args(flags).env_remove("RUST_LOG");
    command
}

impl Served {
    /// Starts one and waits until it says that it is ready.
    pub(crate) fn start(run_dir: &Path, flags: &[&str]) -> Self {
        Self::start_as(serve(run_dir, flags), run_dir)
    }

    /// The same by a command that is made already.
    pub(crate) fn start_as(mut command: Command, run_dir: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let notify = folder.path().join("notify");
        let notified = UnixDatagram::bind(&notify).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut child = command
            .env("NOTIFY_SOCKET", &notify)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let mut served = Self {
            child,
            lines,
            said: Vec::new(),
            notified,
            _folder: folder,
            client: Client::new(run_dir.join("control.sock")),
            runtime: builder.enable_all().build().unwrap(),
        };
        served.await_line("ready");
        assert_eq!(served.told(), "READY=1");
        served
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next that it tells whoever has started it.
    pub(crate) fn told(&self) -> String {
        let mut message = [0; 256];
        let length = self.notified.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap().trim().to_owned()
    }

    /// Waits for the next line of its log that has this in it.
    pub(crate) fn await_line(&mut self, wanted: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if line.contains(wanted) {
                        return serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {wanted:?} in time"),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without {wanted:?}"),
            }
        }
    }

    /// All lines so far that have this in them.
    pub(crate) fn said(&mut self, wanted: &str) -> Vec<String> {
        self.said.extend(self.lines.try_iter());
        self.said.iter().filter(|line| line.contains(wanted)).cloned().collect()
    }

    pub(crate) fn call<T>(&self, call: impl Future<Output = Result<T, ClientError>>) -> T {
        self.runtime.block_on(call).unwrap()
    }

    pub(crate) fn add_template(&self, name: &str, mem_file: &Path) {
        self.call(self.client.add_template(name, &AddTemplate::new(mem_file)));
    }

    pub(crate) fn create(&self, wanted: &CreateFork) -> CreatedFork {
        self.call(self.client.create_fork(wanted))
    }

    pub(crate) fn fork(&self, id: &str) -> Fork {
        self.call(self.client.fork(id))
    }

    /// A fork with a simulated VMM that is served. `wanted` says all but the pid.
    pub(crate) fn serving(&self, wanted: CreateFork, model: &TemplateModel) -> SimVmm {
        let vmm = SimVmm::spawn().unwrap();
        let pid = wanted.path.is_none().then(|| vmm.pid().cast_signed());
        let created = self.create(&CreateFork { pid, ..wanted });
        let path = created.mem_backend.backend_path.clone();
        match created.mem_backend.backend_type {
            pagecast_client::fork::BackendType::Uffd => drop(vmm.run(Connect::new(path, model)).unwrap()),
            pagecast_client::fork::BackendType::File => vmm
                .run(MapFile {
                    path,
                    template: model.clone(),
                })
                .unwrap(),
        }
        self.await_fork(&created.id, ForkState::Serving);
        vmm
    }

    pub(crate) fn await_fork(&self, id: &str, state: ForkState) -> Fork {
        let mut fork = self.fork(id);
        eventually("the fork is as it should be", || {
            fork = self.fork(id);
            fork.state == state
        });
        fork
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it as the kernel does where memory is short.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end, which has to come.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        // Its stderr closes with it.
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Timeout) => panic!("does not end"),
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
            }
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let rest: Vec<String> = self.lines.iter().collect();
            eprintln!("pagecast serve said {:#?} and {rest:#?}", self.said);
        }
    }
}

/// Waits for something that nobody reports.
#[track_caller]
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Has a VMM read all its memory, and every byte be right.
#[track_caller]
pub(crate) fn reads_right(vmm: &SimVmm) {
    let report = vmm.run(Read::default()).unwrap();
    assert_eq!(report.checked.mismatches, 0, "{report:?}");
}

/// Whether it has died by now.
pub(crate) fn is_dead(vmm: &SimVmm) -> bool {
    let mut exited = [rustix::event::PollFd::new(vmm, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut exited, Some(&rustix::event::Timespec::default())).unwrap() > 0
}
