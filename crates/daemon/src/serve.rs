//! A daemon in a process of its own: until a signal stops it.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{info, warn};

use crate::config::Config;
use crate::daemon::Daemon;
use crate::error::StartError;
use crate::logging;

/// Threads of the runtime: the control API is not what this machine is for.
const API_THREADS: usize = 2;

/// Calls that wait for disks and processes at the same time, at most.
const BLOCKING_THREADS: usize = 32;

/// How long forks may take to complete before we say which do not.
const CLOSE_PATIENCE: Duration = Duration::from_mins(1);

/// How long killed processes may take to die.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// How a daemon has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By a signal; no VMM was hurt.
    Closed,
    /// By a second signal: VMMs that were not complete have been killed.
    Killed,
}

/// Runs a daemon until SIGTERM or SIGINT. The first completes all forks and stops; a second kills those that are left.
///
/// # Errors
///
/// [`StartError`].
pub fn serve(config: Config) -> Result<Ended, StartError> {
    logging::start(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(API_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("api")
        .enable_all()
        .build()
        .map_err(|source| StartError::Thread { source })?;
    let ended = runtime.block_on(until_stopped(config));
    // Whoever waits for a slow disk is not waited for.
    runtime.shutdown_background();
    ended
}

async fn until_stopped(config: Config) -> Result<Ended, StartError> {
    let mut signals = Signals::new().map_err(|source| StartError::Thread { source })?;
    let daemon = Daemon::start(config).await?;
    // Only where there is somebody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut asked = false;
    loop {
        signals.next().await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        if asked {
            return Ok(kill(&daemon).await);
        }
        info!(
            event = "stopping",
            forks = daemon.serving(),
            "stopping: forks are completed; a second signal kills their VMMs"
        );
        let closed = tokio::select! {
            closed = daemon.close(CLOSE_PATIENCE) => closed,
            () = signals.next() => return Ok(kill(&daemon).await),
        };
        match closed {
            Ok(()) => {
                info!(event = "stopped", "stopped");
                return Ok(Ended::Closed);
            }
            Err(error) => {
                warn!(
                    event = "staying",
                    error = pagecast::server::chain(&error),
                    "cannot stop, goes on; a second signal kills the VMMs that are left"
                );
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
                asked = true;
            }
        }
    }
}

async fn kill(daemon: &Daemon) -> Ended {
    warn!(event = "killing", "second signal: VMMs are killed");
    if let Err(error) = daemon.kill(KILL_PATIENCE).await {
        warn!(%error, "not all have died");
    }
    Ended::Killed
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
