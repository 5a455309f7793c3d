//! The page server: `pagecast handle` in a process of its own.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::Value;

/// How long it may be silent when something is to come.
const PATIENCE: Duration = Duration::from_mins(2);

/// A running `pagecast handle`, killed when this is dropped.
pub(super) struct Server {
    child: Child,
    socket: PathBuf,
    /// What it says on stderr.
    lines: Receiver<String>,
    /// What it has said of what went wrong.
    complaints: Vec<String>,
}

/// What it says, as far as it matters here.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Listening,
    Ended(Ended),
    NotCompleted {
        id: String,
        error: Value,
    },
    Staying {
        error: Value,
    },
    #[serde(other)]
    Other,
}

/// How the session of a fork ended.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Ended {
    id: String,
    state: String,
    pid: Option<u32>,
    error: Value,
    pub(super) faults: Faults,
    pub(super) fault_latency_us: Latency,
    pub(super) installed_bytes: u64,
}

/// Counts of pages.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Faults {
    pub(super) demand: u64,
}

/// Times to answer a fault, in microseconds.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Latency {
    pub(super) p50: u64,
    pub(super) p99: u64,
}

impl Server {
    /// Starts it for this mem-file and waits until it listens at a socket in `folder`.
    pub(super) fn start(pagecast: &Path, folder: &Path, mem_file: &Path) -> Result<Self> {
        let socket = folder.join("handle.sock");
        let mut child = Command::new(pagecast)
            .args(["handle", "--json", "--socket"])
            .arg(&socket)
            .arg("--mem-file")
            .arg(mem_file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {}", pagecast.display()))?;
        let stderr = BufReader::new(child.stderr.take().expect("it was given a pipe"));
        let (sender, lines) = channel();
        // Ends with the server, whose end of the pipe then closes.
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut server = Self {
            child,
            socket,
            lines,
            complaints: Vec::new(),
        };
        match server.await_listening() {
            Ok(()) => Ok(server),
            Err(error) => Err(server.explain(&error)),
        }
    }

    fn await_listening(&mut self) -> Result<()> {
        loop {
            match self.next_event()? {
                Some(Event::Listening) => return Ok(()),
                Some(_) => {}
                None => bail!("pagecast ended before it listened"),
            }
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Has it complete all forks and end (SIGTERM), and waits until it has; what it said of each fork, by the process
    /// id of its VMM.
    pub(super) fn stop(&mut self) -> Result<HashMap<u32, Ended>> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("failed to signal pagecast")?;
        let mut forks = HashMap::new();
        while let Some(event) = self.next_event()? {
            match event {
                Event::Ended(ended) => {
                    ensure!(ended.state == "complete", "{} is {}", ended.id, ended.state);
                    forks.extend(ended.pid.map(|pid| (pid, ended)));
                }
                Event::NotCompleted { .. } | Event::Staying { .. } => bail!("pagecast could not complete all forks"),
                Event::Listening | Event::Other => {}
            }
        }
        let status = self.child.wait().context("failed to wait for pagecast")?;
        ensure!(status.success(), "pagecast failed ({status})");
        Ok(forks)
    }

    /// Ends it, and adds to the error what it has said of what went wrong.
    pub(super) fn explain(&mut self, error: &anyhow::Error) -> anyhow::Error {
        if let Ok(Some(status)) = self.child.try_wait() {
            self.complaints.push(format!("has ended ({status})"));
        }
        // It fails only for a process that has ended, which is what is wanted.
        let _ = self.child.kill();
        while let Ok(Some(_)) = self.next_event() {}
        let mut text = format!("{error:#}");
        for complaint in &self.complaints {
            text.push_str("\npagecast: ");
            text.push_str(complaint);
        }
        anyhow!(text)
    }

    /// `None` once it has ended.
    fn next_event(&mut self) -> Result<Option<Event>> {
        let line = match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("pagecast has said nothing for {PATIENCE:?}"),
        };
        let event = serde_json::from_str(&line).unwrap_or_else(|_| {
            // Not for machines, such as an error before it listens.
            self.complaints.push(line);
            Event::Other
        });
        match &event {
            Event::Ended(ended) if !ended.error.is_null() => {
                self.complaints.push(format!("{}: {}", ended.id, ended.error));
            }
            Event::NotCompleted { id, error } => self.complaints.push(format!("{id}: {error}")),
            Event::Staying { error } => self.complaints.push(format!("cannot close: {error}")),
            _ => {}
        }
        Ok(Some(event))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // They fail only for a process that has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
