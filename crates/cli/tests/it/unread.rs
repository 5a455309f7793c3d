//! Output that nobody reads holds nothing up: forks are served, templates guarded, calls answered, signals heard.

use std::fs::File;
use std::io::{BufRead as _, BufReader, PipeReader, PipeWriter, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use pagecast_client::{AddTemplate, Backend, Client, CreateFork, ForkState};
use pagecast_testkit::sim_vmm::{Connect, Pages, Read, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use rustix::process::Signal;
use tokio::runtime::Runtime;

use crate::command::{PATIENCE, pagecast};
use crate::host::Host;
use crate::served::{eventually, reads_right, serve};

const SIZE: u64 = 4 << 20;

/// A pipe with room for one page.
fn small_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    assert_eq!(rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap(), 4096);
    (reader, writer)
}

/// The same, without room. Lines that are read from it are empty at first.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = small_pipe();
    writer.write_all(&[b'\n'; 4096]).unwrap();
    (reader, writer)
}

/// A process whose output nobody reads. Dropping it kills it.
struct Unread {
    child: Child,
    unread: PipeReader,
}

impl Unread {
    /// Starts the command with a pipe as its standard error.
    fn start(mut command: Command, (unread, stderr): (PipeReader, PipeWriter)) -> Self {
        let child = command.stderr(stderr).spawn().unwrap();
        Self { child, unread }
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end, which has to come.
    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("it ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon whose log nobody reads, with a template `t`.
struct Daemon {
    process: Unread,
    client: Client,
    runtime: Runtime,
    template: TemplateFile,
    _folder: tempfile::TempDir,
}

impl Daemon {
    fn start(pipe: (PipeReader, PipeWriter)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let template = TemplateFile::create_at(&folder.path().join("t.mem"), TemplateModel::of_data(SIZE, 1)).unwrap();
        let daemon = Self {
            process: Unread::start(serve(&run_dir, &[]), pipe),
            client: Client::new(run_dir.join("control.sock")),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            template,
            _folder: folder,
        };
        eventually("it answers", || daemon.runtime.block_on(daemon.client.health()).is_ok());
        daemon.call(
            daemon
                .client
                .add_template("t", &AddTemplate::new(daemon.template.path())),
        );
        daemon
    }

    fn call<T>(&self, call: impl Future<Output = Result<T, pagecast_client::ClientError>>) -> T {
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, call).await.expect("no answer").unwrap() })
    }

    fn create(&self, id: &str) -> String {
        let wanted = CreateFork {
            id: Some(id.to_owned()),
            backend: Some(Backend::Uffd),
            ..CreateFork::of("t")
        };
        let created = self.call(self.client.create_fork(&wanted));
        created.mem_backend.backend_path.to_str().unwrap().to_owned()
    }

    /// A fork that is served.
    fn serving(&self, id: &str) -> SimVmm {
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(Connect::new(self.create(id), self.template.model())).unwrap();
        eventually("it is served", || {
            self.call(self.client.fork(id)).state == ForkState::Serving
        });
        vmm
    }

    fn dropped_lines(&self) -> u64 {
        let metrics = self.call(self.client.metrics());
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("pagecast_log_lines_dropped_total "));
        line.unwrap().parse().unwrap()
    }
}

#[test]
fn a_daemon_whose_log_nobody_reads_answers_and_ends_in_order() {
    let mut daemon = Daemon::start(small_pipe());
    let vmm = daemon.serving("served");
    for number in 0..200 {
        daemon.create(&format!("waits-{number}"));
    }
    daemon.process.signal(Signal::TERM);
    assert!(daemon.process.wait().success());
    reads_right(&vmm);
}

#[test]
fn a_template_is_not_written_under_its_forks_while_nobody_reads_the_log() {
    let daemon = Daemon::start(full_pipe());
    let vmms: Vec<_> = (0..3).map(|number| daemon.serving(&format!("fork-{number}"))).collect();
    // Held up in `open`.
    std::fs::write(daemon.template.path(), "other bytes").unwrap();
    vmms.iter().for_each(reads_right);
    for fork in daemon.call(daemon.client.forks(false)) {
        assert_eq!(fork.state, ForkState::Complete, "{fork:?}");
    }
}

#[test]
fn log_lines_that_nobody_reads_are_dropped_counted_and_told() {
    let mut daemon = Daemon::start(full_pipe());
    assert_eq!(daemon.dropped_lines(), 0);
    // More than the queue has room for.
    let mut number = 0;
    while daemon.dropped_lines() == 0 {
        for _ in 0..100 {
            let id = format!("fork-{number}");
            daemon.create(&id);
            daemon.call(daemon.client.remove_fork(&id, false));
            number += 1;
        }
        assert!(number < 2000, "nothing is dropped");
    }
    // Each has made three lines, which are written by now or in the queue.
    assert!(number > 2048 / 3, "{number}");
    let mut lines = BufReader::new(&daemon.process.unread).lines().map(Result::unwrap);
    let told = lines.find(|line| line.contains("\"log_lines_dropped\"")).unwrap();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(
        (&told["level"], told["lines"].as_u64()),
        (&"WARN".into(), Some(daemon.dropped_lines()))
    );
    daemon.process.signal(Signal::TERM);
    let stopped = lines.any(|line| line.contains("\"stopped\""));
    assert!(stopped, "the last lines are missing");
    drop(lines);
    assert!(daemon.process.wait().success());
}

/// `handle` whose lines nobody reads, and a VMM that it serves.
fn handled(folder: &Path, template: &TemplateFile, flags: &[&str]) -> (Unread, SimVmm) {
    let socket = folder.join("handle.sock");
    let mut command = pagecast();
    command
        .args(["handle", "--socket"])
        .arg(&socket)
        .arg("--mem-file")
        .arg(template.path())
        .args(flags);
    let handle = Unread::start(command, full_pipe());
    // Its file is there before it listens.
    eventually("it listens", || UnixStream::connect(&socket).is_ok());
    let vmm = SimVmm::spawn().unwrap();
    vmm.run(Connect::new(&socket, template.model())).unwrap();
    let read = Read {
        pages: Pages::range(0..10),
        ..Read::default()
    };
    assert_eq!(vmm.run(read).unwrap().checked.mismatches, 0);
    (handle, vmm)
}

#[test]
fn handle_whose_lines_nobody_reads_hears_signals() {
    for flags in [&[][..], &["--json"]] {
        let folder = tempfile::tempdir().unwrap();
        let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
        let (mut handle, vmm) = handled(folder.path(), &template, flags);
        handle.signal(Signal::TERM);
        assert!(handle.wait().success());
        reads_right(&vmm);
    }
}

#[test]
fn the_template_of_a_handle_whose_lines_nobody_reads_is_not_written_under_its_forks() {
    let folder = tempfile::tempdir().unwrap();
    let template = TemplateFile::create(TemplateModel::of_data(SIZE, 1)).unwrap();
    let (mut handle, vmm) = handled(folder.path(), &template, &[]);
    // Held up in `open`.
    std::fs::write(template.path(), "other bytes").unwrap();
    reads_right(&vmm);
    assert_eq!(handle.wait().code(), Some(1));
}

#[test]
fn a_kept_run_whose_report_nobody_reads_hears_signals() {
    let Some(host) = Host::new() else { return };
    let (unread, stdout) = full_pipe();
    let log = tempfile::tempdir().unwrap();
    let log = log.path().join("log");
    let mut command = host.command(&["-n", "2", "--keep", "--json"]);
    command
        .stdout(stdout)
        .stdin(Stdio::null())
        .stderr(File::create(&log).unwrap());
    let child = command.spawn().unwrap();
    let mut run = Unread { child, unread };
    eventually("all are kept", || {
        std::fs::read_to_string(&log).unwrap().contains("API sockets")
    });
    run.signal(Signal::TERM);
    assert!(run.wait().success());
    host.assert_nothing_is_left();
}
