//! Ending early and leaving nothing behind.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use pagecast_command::signals;
use procfs::process::{Process, all_processes};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

/// How long to wait for the next process that was about to be started.
const PACE: Duration = Duration::from_millis(20);

/// Whether a signal asks us to end. Clones are about the same.
///
/// From that signal on, every process that we start is killed, so that whoever waits for one fails, returns, and cleans
/// up on the way, as after any error.
#[derive(Debug, Clone)]
pub struct Interrupt {
    /// The signal; 0 before there was one.
    signal: Arc<AtomicI32>,
}

impl Interrupt {
    /// Watches from now on until we end, instead of ending at once. Signals that were ignored before stay ignored.
    ///
    /// # Errors
    ///
    /// Signals cannot be watched for.
    pub fn watch() -> Result<Self> {
        let signal = Arc::new(AtomicI32::new(0));
        let seen = Arc::clone(&signal);
        // The first signal ends everything, so no other is waited for.
        signals::watch(move |signal| {
            seen.store(signal.number(), Ordering::Relaxed);
            loop {
                kill_children();
                thread::sleep(PACE);
            }
        })
        .context("failed to watch for signals")?;
        Ok(Self { signal })
    }

    /// The signal, if there was one.
    pub fn signal(&self) -> Option<i32> {
        Some(self.signal.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }

    /// The exit code after the signal, if there was one: 128 and its number.
    pub fn exit_code(&self) -> Option<ExitCode> {
        let code = |signal| u8::try_from(128 + signal).map_or(ExitCode::FAILURE, ExitCode::from);
        self.signal().map(code)
    }

    /// An error if there was a signal.
    ///
    /// # Errors
    ///
    /// There was one.
    pub fn check(&self) -> Result<()> {
        match self.signal() {
            None => Ok(()),
            Some(signal) => bail!("interrupted by signal {signal}"),
        }
    }
}

/// What goes wrong here has ended meanwhile, or is tried again.
fn kill_children() {
    for child in all_processes().into_iter().flatten().flatten() {
        if is_ours(&child)
            && let Some(pid) = Pid::from_raw(child.pid)
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            // Its number may have become another process's before there was a pidfd.
            && Process::new(child.pid).is_ok_and(|child| is_ours(&child))
        {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

fn is_ours(process: &Process) -> bool {
    process
        .stat()
        .is_ok_and(|stat| stat.ppid == getpid().as_raw_nonzero().get())
}
