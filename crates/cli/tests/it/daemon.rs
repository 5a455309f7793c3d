//! A running `pagecast serve`.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde_json::Value;
use tempfile::TempDir;

use crate::command::{PATIENCE, pagecast, text};

/// A daemon with a run dir of its own. Dropping it kills it.
pub(crate) struct Daemon {
    child: Child,
    folder: TempDir,
}

impl Daemon {
    /// Starts one and waits until it says that it is ready.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ready = folder.path().join("ready.sock");
        let notified = UnixDatagram::bind(&ready).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let child = pagecast()
            .args(["serve", "--run-dir"])
            .arg(folder.path().join("run"))
            .env("NOTIFY_SOCKET", &ready)
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self { child, folder };
        let mut message = [0; 64];
        let length = notified.recv(&mut message).unwrap();
        assert_eq!(&message[..length], b"READY=1\n");
        daemon
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("run/control.sock")
    }

    /// A folder that goes with the daemon.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The command, told of this daemon.
    pub(crate) fn pagecast(&self, arguments: &[&str]) -> Command {
        let mut command = pagecast();
        command.args(arguments).env("PAGECAST_SOCKET", self.socket());
        command
    }

    /// What the command says and how it ends.
    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.pagecast(arguments).output().unwrap()
    }

    /// What the command prints, which has to succeed.
    pub(crate) fn prints(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        text(&output.stdout)
    }

    /// The JSON that the command prints, which has to succeed.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let printed = self.prints(&[arguments, &["--json"]].concat());
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{printed:?}: {error}"))
    }

    /// The command has to fail with this code; what it says about that.
    pub(crate) fn refuses(&self, arguments: &[&str], code: i32) -> String {
        let output = self.output(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
        text(&output.stderr)
    }

    /// Adds a template with this memory file.
    pub(crate) fn add_template(&self, name: &str, mem_file: &Path) {
        self.prints(&["template", "add", name, "--mem-file", mem_file.to_str().unwrap()]);
    }

    /// All forks that it knows.
    pub(crate) fn forks(&self) -> Vec<Value> {
        let Value::Array(forks) = self.json(&["fork", "ls"]) else {
            panic!("no array");
        };
        forks
    }

    /// Stops all of its threads, and waits until they stand still.
    pub(crate) fn stop(&self) {
        signal(&self.child, Signal::STOP);
        let (_, status) = waitpid(Some(Pid::from_child(&self.child)), WaitOptions::UNTRACED)
            .unwrap()
            .unwrap();
        assert!(status.stopped(), "{status:?}");
    }

    /// Lets them go on.
    pub(crate) fn go_on(&self) {
        signal(&self.child, Signal::CONT);
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log"));
            eprintln!("pagecast serve said:\n{}", log.unwrap_or_default());
        }
    }
}

/// Waits until that is so, which has to come.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal to a child.
pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}
