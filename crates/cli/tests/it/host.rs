//! What `pagecast run` needs, and what it starts.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use pagecast_testkit::firecracker::{Drive, Snapshot, SnapshotOptions, binary, kvm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;

use crate::command::PATIENCE;
use crate::daemon::{Daemon, eventually};

/// A daemon with the template `base`, and a folder for runs.
pub(crate) struct Host {
    pub(crate) daemon: Daemon,
    pub(crate) runs: TempDir,
    pub(crate) template: TempDir,
    pub(crate) firecracker: PathBuf,
}

/// A `pagecast run` that runs.
pub(crate) struct Running {
    pub(crate) child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

/// A Firecracker that runs.
pub(crate) struct Vmm {
    pub(crate) pid: Pid,
    pidfd: OwnedFd,
    pub(crate) folder: PathBuf,
}

impl Host {
    /// None where Firecracker cannot run here.
    pub(crate) fn new() -> Option<Self> {
        Self::with_drive(None)
    }

    /// The guest of the template has a drive: a file in the folder of the template.
    pub(crate) fn with_writable_drive() -> Option<Self> {
        Self::with_drive(Some(false))
    }

    /// The same, and Firecracker opens the file for reading only.
    pub(crate) fn with_read_only_drive() -> Option<Self> {
        Self::with_drive(Some(true))
    }

    fn with_drive(read_only: Option<bool>) -> Option<Self> {
        if kvm().unwrap().skips() {
            return None;
        }
        let template = tempfile::tempdir().unwrap();
        let options = SnapshotOptions {
            mem_mib: 32,
            fill_mib: 8,
            drive: read_only.map(|read_only| {
                let path = template.path().canonicalize().unwrap().join("disk");
                fs::write(&path, vec![0; 1 << 20]).unwrap();
                Drive { path, read_only }
            }),
            ..SnapshotOptions::default()
        };
        let snapshot = Snapshot::create(&options, template.path()).unwrap();
        let daemon = Daemon::start();
        let [mem, vmstate] = [&snapshot.mem_path, &snapshot.vmstate_path].map(|path| path.to_str().unwrap());
        daemon.prints(&["template", "add", "base", "--mem-file", mem, "--vmstate", vmstate]);
        Some(Self {
            daemon,
            runs: tempfile::tempdir().unwrap(),
            template,
            firecracker: binary().unwrap(),
        })
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(&["run", "--template", "base"], arguments)
    }

    /// `pagecast template train base`.
    pub(crate) fn train(&self, arguments: &[&str]) -> Command {
        self.command_of(&["template", "train", "base"], arguments)
    }

    fn command_of(&self, command: &[&str], arguments: &[&str]) -> Command {
        let mut command = self.daemon.pagecast(command);
        let folder = if arguments.contains(&"--jailer") {
            "--chroot-base-dir"
        } else {
            "--dir"
        };
        command.arg(folder).arg(self.runs.path()).args(arguments);
        if !arguments.contains(&"--firecracker") {
            command.arg("--firecracker").arg(&self.firecracker);
        }
        command
    }

    /// What a run says and how it ends.
    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        let mut child = self
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Running { child, stdout, stderr }
    }

    /// The Firecrackers of all runs: those whose current folder is a folder of one. What is dead has none.
    pub(crate) fn vmms(&self) -> Vec<Vmm> {
        let mut vmms = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let entry = entry.unwrap();
            let pid = entry.file_name().to_str().unwrap().parse().ok().and_then(Pid::from_raw);
            let folder = fs::read_link(entry.path().join("cwd"));
            if let (Some(pid), Ok(folder)) = (pid, folder)
                && folder.starts_with(self.runs.path())
                && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            {
                vmms.push(Vmm { pid, pidfd, folder });
            }
        }
        vmms
    }

    /// Waits until so many Firecrackers have been told to load a snapshot.
    pub(crate) fn await_loading(&self, count: usize) -> Vec<Vmm> {
        let mut vmms = Vec::new();
        eventually("they load", || {
            vmms = self.vmms();
            vmms.len() == count && vmms.iter().all(|vmm| vmm.log().contains("/snapshot/load"))
        });
        vmms
    }

    /// A state file that never comes to an end, because nobody writes to it: who loads it does so for ever.
    pub(crate) fn endless_vmstate(&self) -> String {
        let path = self.template.path().join("endless");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A Firecracker that does this first, in a shell, where it is told more than to say its version.
    pub(crate) fn firecracker_after(&self, script: &str) -> String {
        let path = self.template.path().join("firecracker");
        let real = self.firecracker.display();
        let script = format!("#!/bin/sh\n[ \"$1\" = --version ] || {{ {script}; }}\nexec {real} \"$@\"\n");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub(crate) fn assert_nothing_is_left(&self) {
        let folders: Vec<_> = self.runs.path().read_dir().unwrap().collect();
        assert!(folders.is_empty(), "{folders:?}");
        let pids: Vec<_> = self.vmms().iter().map(|vmm| vmm.pid).collect();
        assert!(pids.is_empty(), "{pids:?}");
        let forks = self.daemon.forks();
        assert!(forks.is_empty(), "{forks:#?}");
    }
}

impl Running {
    /// The next line on stdout, which has to come.
    pub(crate) fn report(&self) -> Value {
        let line = self.stdout.recv_timeout(PATIENCE).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Waits for a line on stderr.
    pub(crate) fn await_line(&self, part: &str) -> String {
        loop {
            let line = self.stderr.recv_timeout(PATIENCE).unwrap();
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Waits for its end; its exit code, and what else it said on stderr.
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        loop {
            match self.stderr.recv_timeout(PATIENCE) {
                Ok(line) => said += &(line + "\n"),
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; it said {said}"),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vmm {
    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    pub(crate) fn id(&self) -> &str {
        self.folder.file_name().unwrap().to_str().unwrap()
    }

    pub(crate) fn kill(&self) {
        kill_process(self.pid, Signal::KILL).unwrap();
    }

    /// Whether it ends, if it is waited for that long.
    fn ends_within(&self, patience: Timespec) -> bool {
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&patience)).unwrap() > 0
    }

    pub(crate) fn await_end(&self) {
        assert!(
            self.ends_within(Timespec::try_from(PATIENCE).unwrap()),
            "{} lives",
            self.pid
        );
    }

    pub(crate) fn lives(&self) -> bool {
        !self.ends_within(Timespec::default())
    }
}

/// The lines of a stream, as they come.
fn lines(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
