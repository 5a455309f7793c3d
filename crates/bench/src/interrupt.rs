//! An early end that leaves nothing behind.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use pagecast_command::signals;
use procfs::process::{Process, all_processes};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

/// Time between two attempts to kill a process that is being started.
const PACE: Duration = Duration::from_millis(20);

/// A signal that asks for the end. Clones share it.
///
/// From that signal on, every process that we start is killed. So every wait for one fails, returns, and cleans up as
/// after any error.
#[derive(Debug, Clone)]
pub struct Interrupt {
    /// The signal; 0 before it comes.
    signal: Arc<AtomicI32>,
}

impl Interrupt {
    /// Catches signals from now on, which then no longer end the process. Ignored signals stay ignored.
    ///
    /// # Errors
    ///
    /// Signals cannot be caught.
    pub fn watch() -> Result<Self> {
        let signal = Arc::new(AtomicI32::new(0));
        let seen = Arc::clone(&signal);
        // The first signal ends everything, so later ones do not matter.
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

    /// Returns the signal, if there was one.
    pub fn signal(&self) -> Option<i32> {
        Some(self.signal.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }

    /// Returns the exit code after the signal, if there was one: 128 and its number.
    pub fn exit_code(&self) -> Option<ExitCode> {
        let code = |signal| u8::try_from(128 + signal).map_or(ExitCode::FAILURE, ExitCode::from);
        self.signal().map(code)
    }

    /// Fails if there was a signal.
    ///
    /// # Errors
    ///
    /// There was a signal.
    pub fn check(&self) -> Result<()> {
        match self.signal() {
            None => Ok(()),
            Some(signal) => bail!("interrupted by signal {signal}"),
        }
    }
}

/// An error means that the process has ended, or the kill is retried.
fn kill_children() {
    for child in all_processes().into_iter().flatten().flatten() {
        if is_ours(&child)
            && let Some(pid) = Pid::from_raw(child.pid)
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
            // Its process ID may have been reused before the pidfd was opened.
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
