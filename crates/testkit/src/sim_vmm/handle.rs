//! The test's side of a simulated VMM: starts it, sends requests, waits for answers.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write as _};
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use pagecast_uffd::PidFd;
use rustix::event::{PollFd, PollFlags};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::protocol::{Answer, Command, Request, Work};

/// Time for any request, unless the test sets another.
const PATIENCE: Duration = Duration::from_mins(1);

/// A simulated VMM in a process of its own, killed and reaped when dropped.
#[derive(Debug)]
pub struct SimVmm {
    pid: u32,
    pidfd: PidFd,
    child: Mutex<Child>,
    stdin: Mutex<ChildStdin>,
    next_id: AtomicU64,
    answers: Arc<Answers>,
}

/// A running request. Dropping it does not stop it.
#[derive(Debug)]
#[must_use]
pub struct Job<T> {
    id: u64,
    name: &'static str,
    answers: Arc<Answers>,
    report: PhantomData<fn() -> T>,
}

/// Answers that have come and were not yet fetched.
#[derive(Debug)]
struct Answers {
    pid: u32,
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    answers: HashMap<u64, Result<Value, String>>,
    /// No more answers will come.
    ended: bool,
}

impl SimVmm {
    /// Starts a simulated VMM.
    ///
    /// # Errors
    ///
    /// The binary is missing (the error has the command to build it), or cannot be started.
    pub fn spawn() -> Result<Self> {
        Self::spawn_by(std::process::Command::new(binary()?))
    }

    /// Starts one as another user. Needs root, and a binary that this user may execute.
    ///
    /// # Errors
    ///
    /// Those of [`spawn`](Self::spawn).
    pub fn spawn_as(uid: u32) -> Result<Self> {
        let mut command = std::process::Command::new(binary()?);
        command.uid(uid);
        Self::spawn_by(command)
    }

    /// Starts one by a command of the caller: a program that calls [`run`](super::run) and uses its stdin and stdout
    /// for nothing else.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn spawn_by(mut command: std::process::Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {}", command.get_program().display()))?;
        let pid = child.id();
        let pidfd = PidFd::open(pid.try_into()?)?;
        let stdin = child.stdin.take().context("stdin is a pipe")?;
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let answers = Arc::new(Answers {
            pid,
            inbox: Mutex::default(),
            changed: Condvar::new(),
        });
        let sink = Arc::clone(&answers);
        std::thread::spawn(move || sink.collect(stdout));
        Ok(Self {
            pid,
            pidfd,
            child: Mutex::new(child),
            stdin: Mutex::new(stdin),
            next_id: AtomicU64::new(0),
            answers,
        })
    }

    /// Returns its process ID.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a request and waits up to a minute for the report.
    ///
    /// # Errors
    ///
    /// It failed, died, or did not answer in time.
    pub fn run<W: Work>(&self, work: W) -> Result<W::Report> {
        self.start(work)?.join()
    }

    /// Sends a request without waiting. Requests run on threads of their own.
    ///
    /// # Errors
    ///
    /// It is dead.
    pub fn start<W: Work>(&self, work: W) -> Result<Job<W::Report>> {
        self.send(work.into())
    }

    /// Makes it exit with this code, and reaps it.
    ///
    /// # Errors
    ///
    /// It is dead already, or does not exit within a minute.
    pub fn exit(&self, code: i32) -> Result<ExitStatus> {
        let _no_answer: Job<()> = self.send(Command::Exit(code))?;
        self.wait()
    }

    /// Makes it abort (SIGABRT), and reaps it.
    ///
    /// # Errors
    ///
    /// Those of [`exit`](Self::exit).
    pub fn abort(&self) -> Result<ExitStatus> {
        let _no_answer: Job<()> = self.send(Command::Abort)?;
        self.wait()
    }

    /// Kills it (SIGKILL), and reaps it. Succeeds if it is already dead.
    ///
    /// # Errors
    ///
    /// It does not die within a minute.
    pub fn kill(&self) -> Result<ExitStatus> {
        self.pidfd.kill()?;
        self.wait()
    }

    /// Waits up to a minute until it has died, for any reason, and reaps it.
    ///
    /// # Errors
    ///
    /// It still lives.
    pub fn wait(&self) -> Result<ExitStatus> {
        let mut exited = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let patience = PATIENCE.try_into()?;
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut exited, Some(&patience)))?;
        if ready == 0 {
            bail!("sim-vmm (pid {}) has not died within {PATIENCE:?}", self.pid);
        }
        Ok(lock(&self.child).wait()?)
    }

    fn send<T>(&self, command: Command) -> Result<Job<T>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let name = command.name();
        let mut line = serde_json::to_vec(&Request { id, command })?;
        line.push(b'\n');
        lock(&self.stdin)
            .write_all(&line)
            .with_context(|| format!("failed to ask sim-vmm (pid {}) for {name}", self.pid))?;
        Ok(Job {
            id,
            name,
            answers: Arc::clone(&self.answers),
            report: PhantomData,
        })
    }
}

impl AsFd for SimVmm {
    /// Returns a pidfd, which is readable once it has exited.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for SimVmm {
    fn drop(&mut self) {
        // If this fails it is already dead, or nothing can be done.
        let _ = self.pidfd.kill();
        let _ = lock(&self.child).wait();
    }
}

impl<T: DeserializeOwned> Job<T> {
    /// Waits up to a minute for the report.
    ///
    /// # Errors
    ///
    /// It failed, its process died, or it is not done in time.
    pub fn join(self) -> Result<T> {
        self.join_within(PATIENCE)
    }

    /// Waits up to `patience` for the report.
    ///
    /// # Errors
    ///
    /// Those of [`join`](Self::join).
    pub fn join_within(self, patience: Duration) -> Result<T> {
        let Self { id, name, answers, .. } = self;
        let value = answers.wait(id, name, Instant::now() + patience)?;
        serde_json::from_value(value).with_context(|| format!("sim-vmm answered {name} with something else"))
    }

    /// Returns `true` if the request has ended, with or without success.
    pub fn is_done(&self) -> bool {
        let inbox = lock(&self.answers.inbox);
        inbox.ended || inbox.answers.contains_key(&self.id)
    }
}

impl Answers {
    fn collect(&self, stdout: ChildStdout) {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            match serde_json::from_str::<Answer>(&line) {
                Ok(answer) => lock(&self.inbox).answers.insert(answer.id, answer.result),
                // A partial line of a process that was killed.
                Err(_) => break,
            };
            self.changed.notify_all();
        }
        lock(&self.inbox).ended = true;
        self.changed.notify_all();
    }

    fn wait(&self, id: u64, name: &str, deadline: Instant) -> Result<Value> {
        let pid = self.pid;
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(answer) = inbox.answers.remove(&id) {
                return answer.map_err(|error| anyhow!("sim-vmm (pid {pid}) failed to {name}: {error}"));
            }
            if inbox.ended {
                bail!("sim-vmm (pid {pid}) died before it was done with {name}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("sim-vmm (pid {pid}) was not done with {name} in time");
            }
            inbox = self
                .changed
                .wait_timeout(inbox, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Finds `sim-vmm` beside the running test: tests are in `target/<profile>/deps`, binaries one above.
fn binary() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    test.ancestors()
        .skip(1)
        .take(3)
        .map(|directory| directory.join("sim-vmm"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no sim-vmm beside {}: build it with `cargo build -p pagecast-testkit --bins`",
                test.display()
            )
        })
}
