//! The command, run to its end, and a running `pagecast handle`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::Value;

/// Long enough for anything that works, on a busy machine; reached only where something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The command, without what the environment says of colours.
pub(crate) fn pagecast() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagecast"));
    for variable in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// What it says and how it ends.
pub(crate) fn output(arguments: &[&str]) -> Output {
    pagecast().args(arguments).output().unwrap()
}

/// What it said, which is text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_owned()).unwrap()
}

/// `pagecast handle --json`, with what it says.
pub(crate) struct Handle {
    child: Child,
    lines: Receiver<String>,
    said: Vec<Value>,
    pub(crate) socket: PathBuf,
}

impl Handle {
    /// Starts one and waits until it listens.
    pub(crate) fn start(folder: &Path, mem_file: &Path) -> Self {
        Self::start_with(folder, mem_file, &[])
    }

    /// The same, with more flags.
    pub(crate) fn start_with(folder: &Path, mem_file: &Path, flags: &[&str]) -> Self {
        let mut command = Self::command(folder, mem_file);
        command.args(flags);
        Self::start_as(command, folder)
    }

    /// The command that listens in this folder.
    pub(crate) fn command(folder: &Path, mem_file: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagecast"));
        command.args(["handle", "--json", "--socket"]);
        command.arg(folder.join("handle.sock")).arg("--mem-file").arg(mem_file);
        command
    }

    /// Starts a command that is made already.
    pub(crate) fn start_as(mut command: Command, folder: &Path) -> Self {
        let socket = folder.join("handle.sock");
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut handle = Self {
            child,
            lines,
            said: Vec::new(),
            socket,
        };
        handle.await_event("listening");
        handle
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line about this event.
    pub(crate) fn await_event(&mut self, event: &str) -> Value {
        loop {
            let line = match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => panic!("no {event:?} in time; said {:#?}", self.said),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without {event:?}; said {:#?}", self.said),
            };
            let value: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
            self.said.push(value.clone());
            if value["event"] == event {
                return value;
            }
        }
    }

    /// The lines about this event so far.
    pub(crate) fn said(&self, event: &str) -> Vec<&Value> {
        self.said.iter().filter(|value| value["event"] == event).collect()
    }

    /// Waits for so many lines about this event.
    pub(crate) fn await_events(&mut self, event: &str, count: usize) -> Vec<Value> {
        (0..count).map(|_| self.await_event(event)).collect()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end, which has to come.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        // Its stderr closes with it.
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.said.push(serde_json::from_str(&line).unwrap()),
                Err(RecvTimeoutError::Timeout) => panic!("does not end; said {:#?}", self.said),
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let rest: Vec<String> = self.lines.iter().collect();
            eprintln!("pagecast handle said {:#?} and {rest:#?}", self.said);
        }
    }
}
