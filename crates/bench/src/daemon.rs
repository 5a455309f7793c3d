//! A `pagecast serve` process, called through its control API.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use pagecast::template::WorkingSet;
use pagecast_client::fork::Fork;
use pagecast_client::{AddTemplate, Backend, Client, ClientError, CreateFork, ForkState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tokio::runtime::Runtime;

use crate::fleet::{Template, tag};

/// The name of its only template.
pub const TEMPLATE: &str = "template";

/// Time that the start may take.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks at a starting daemon.
const START_PACE: Duration = Duration::from_millis(100);
/// Time that completing all forks and the end may take.
const STOP_PATIENCE: Duration = Duration::from_mins(2);
/// Time for forks to reach the awaited state.
const FORK_PATIENCE: Duration = Duration::from_mins(1);
/// Time between two looks at them.
const FORK_PACE: Duration = Duration::from_millis(10);
/// Number of log lines that an error shows.
const TAIL_LINES: usize = 15;

/// A daemon in a folder of its own, killed when this is dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    client: Client,
    runtime: Runtime,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon with its run dir and log in `folder`, which must exist and be used for this alone. Waits until
    /// it is ready.
    ///
    /// # Errors
    ///
    /// It cannot be started, or is not ready in time; with the end of its log.
    pub fn start(pagecast: &Path, folder: &Path, settings: &[&str]) -> Result<Self> {
        let (run_dir, log, notify) = (folder.join("run"), folder.join("log"), folder.join("notify"));
        // Uses the notification of service managers, so that no call has to be retried.
        let ready = UnixDatagram::bind(&notify).context("failed to bind a socket for its readiness")?;
        ready.set_read_timeout(Some(START_PACE))?;
        let child = Command::new(pagecast)
            .arg0("pagecast")
            .args(["serve", "--run-dir"])
            .arg(&run_dir)
            .args(settings)
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).context("failed to create its log")?)
            .spawn()
            .with_context(|| format!("failed to start {}", pagecast.display()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("failed to make a runtime for its client")?;
        let mut daemon = Self {
            child,
            client: Client::new(run_dir.join("control.sock")),
            runtime,
            log,
        };
        match daemon.await_ready(&ready) {
            Ok(()) => Ok(daemon),
            Err(error) => Err(daemon.explain(&error)),
        }
    }

    fn await_ready(&mut self, ready: &UnixDatagram) -> Result<()> {
        let deadline = Instant::now() + START_PATIENCE;
        let mut message = [0; 256];
        loop {
            match ready.recv(&mut message) {
                Ok(len) if String::from_utf8_lossy(&message[..len]).contains("READY=1") => return Ok(()),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if let Some(status) = self.child.try_wait().context("failed to look after pagecast")? {
                        bail!("pagecast ended before it was ready ({status})");
                    }
                    ensure!(
                        Instant::now() < deadline,
                        "pagecast is not ready after {START_PATIENCE:?}"
                    );
                }
                Err(error) => return Err(error).context("failed to wait for pagecast"),
            }
        }
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes a call. May be called from any thread.
    ///
    /// # Errors
    ///
    /// Those of the call.
    pub fn call<T>(&self, call: impl AsyncFnOnce(&Client) -> Result<T, ClientError>) -> Result<T> {
        Ok(self.runtime.block_on(call(&self.client))?)
    }

    /// Adds the mem-file as [`TEMPLATE`].
    ///
    /// # Errors
    ///
    /// The daemon refuses it.
    pub fn add_template(&self, mem_file: &Path) -> Result<()> {
        self.call(async |client| client.add_template(TEMPLATE, &AddTemplate::new(mem_file)).await)
            .context("the template is refused")?;
        Ok(())
    }

    /// Records one fork of the template, which must be [added](Self::add_template). The working set is kept beside the mem-file, where
    /// all daemons find it.
    ///
    /// # Errors
    ///
    /// The fork fails, or nothing is learned.
    pub fn learn(&self, template: &dyn Template) -> Result<()> {
        let vmm = template.start()?;
        let wanted = CreateFork {
            id: Some("recorded".to_owned()),
            backend: Some(Backend::Uffd),
            record: true,
            ..CreateFork::of(TEMPLATE)
        };
        let created = self.call(async |client| client.create_fork(&wanted).await)?;
        let (mut vmm, _) = vmm.restore(tag(0), &created.mem_backend)?;
        vmm.touch(template.working_set())?;
        drop(vmm);
        let deadline = Instant::now() + FORK_PATIENCE;
        // The daemon shows it before it is kept.
        while !WorkingSet::path_for(template.mem_file()).exists() {
            ensure!(
                Instant::now() < deadline,
                "nothing was learned of a fork that was recorded"
            );
            std::thread::sleep(FORK_PACE);
        }
        Ok(())
    }

    /// Waits for the end of a fork. Returns its final state.
    ///
    /// # Errors
    ///
    /// It does not end in time.
    pub fn await_end(&self, id: &str) -> Result<Fork> {
        let deadline = Instant::now() + FORK_PATIENCE;
        loop {
            let fork = self.call(async |client| client.fork(id).await)?;
            if fork.state.is_end() {
                return Ok(fork);
            }
            ensure!(
                Instant::now() < deadline,
                "{id} is {} after {FORK_PATIENCE:?}",
                fork.state
            );
            std::thread::sleep(FORK_PACE);
        }
    }

    /// Waits until `count` forks are in this state.
    ///
    /// # Errors
    ///
    /// They are not in time.
    pub fn await_state(&self, state: ForkState, count: u32) -> Result<()> {
        let deadline = Instant::now() + FORK_PATIENCE;
        loop {
            let health = self.call(async |client| client.health().await)?;
            if health.forks.get(&state).copied().unwrap_or_default() == u64::from(count) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "not {count} forks are {state} after {FORK_PATIENCE:?}: {:?}",
                health.forks
            );
            std::thread::sleep(FORK_PACE);
        }
    }

    /// Makes it complete all forks and end (SIGTERM), and waits for that.
    ///
    /// # Errors
    ///
    /// It does not end in time, or fails.
    pub fn stop(&mut self) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("failed to open a pidfd of pagecast")?;
        kill_process(pid, Signal::TERM).context("failed to signal pagecast")?;
        let patience = Timespec::try_from(STOP_PATIENCE).context("timeout out of range")?;
        let ended = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)));
        ensure!(
            ended.context("failed to wait for pagecast")? > 0,
            "pagecast has not ended after {STOP_PATIENCE:?}"
        );
        let status = self.child.wait().context("failed to wait for pagecast")?;
        ensure!(status.success(), "pagecast failed ({status})");
        Ok(())
    }

    /// The error, with the end of its log.
    pub fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        anyhow!("{error:#}\npagecast's log ends with:\n{}", tail.join("\n"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // They fail only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
