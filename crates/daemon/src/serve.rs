//! Runs a daemon in a process of its own, until a signal stops it.

use std::sync::mpsc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tracing::{info, warn};

use crate::config::Config;
use crate::daemon::Daemon;
use crate::error::StartError;
use crate::logging;
use pagecast_command::signals::{self, EndSignal, Escalation, Reaction};

/// Threads of the runtime. Few, since this host is for VMMs, not for the control API.
const API_THREADS: usize = 2;

/// Most calls that wait for disks and processes at the same time.
const BLOCKING_THREADS: usize = 32;

/// Time that forks have to complete before the daemon logs that it cannot stop.
const CLOSE_TIMEOUT: Duration = Duration::from_mins(1);

/// Time that killed processes have to die.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Time that idle threads for calls are kept: forever. The first one exists once the daemon has started, so calls are
/// answered even if no more threads can be created (`TasksMax`).
const BLOCKING_KEEP_ALIVE: Duration = Duration::from_secs(u32::MAX as u64);

/// The way a daemon has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By a signal. No VMM was killed.
    Closed,
    /// By a second signal. VMMs of forks that were not complete were killed.
    Killed,
}

/// Runs a daemon until a [signal](signals) stops it: then all forks are completed. A second SIGTERM, SIGINT or SIGQUIT
/// kills the remaining VMMs.
///
/// Log lines may still be in the queue of [`stderr`](pagecast_command::stderr) afterwards.
///
/// # Errors
///
/// [`StartError`].
pub fn serve(config: Config) -> Result<Ended, StartError> {
    logging::start(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(API_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP_ALIVE)
        .thread_name("api")
        .enable_all()
        .build()
        .map_err(|source| StartError::Thread { source })?;
    let ended = runtime.block_on(until_stopped(config));
    // Does not wait for calls that wait for a slow disk.
    runtime.shutdown_background();
    ended
}

async fn until_stopped(config: Config) -> Result<Ended, StartError> {
    let mut signals = Signals::watch().map_err(|source| StartError::Thread { source })?;
    let supervisor = Supervisor::start().map_err(|source| StartError::Thread { source })?;
    let daemon = Daemon::start(config).await?;
    supervisor.tell(NotifyState::Ready);
    loop {
        if signals.next().await == Reaction::Kill {
            return Ok(kill(&daemon).await);
        }
        supervisor.tell(NotifyState::Stopping);
        info!(
            event = "stopping",
            forks = daemon.serving(),
            "stopping: forks are completed; a second signal kills their VMMs"
        );
        let closed = tokio::select! {
            closed = daemon.close(CLOSE_TIMEOUT) => closed,
            () = signals.kill() => return Ok(kill(&daemon).await),
        };
        match closed {
            Ok(()) => {
                info!(event = "stopped", "stopped");
                return Ok(Ended::Closed);
            }
            Err(error) => {
                supervisor.tell(NotifyState::Ready);
                warn!(
                    event = "staying",
                    error = pagecast::server::chain(&error),
                    "cannot stop, still serving; a second signal kills the remaining VMMs"
                );
            }
        }
    }
}

async fn kill(daemon: &Daemon) -> Ended {
    let killed = daemon.kill(KILL_TIMEOUT).await;
    warn!(event = "killing", "second signal: VMMs are killed");
    if let Err(error) = killed {
        warn!(%error, "some VMMs have not died");
    }
    Ended::Killed
}

/// Signals, and the way to end that they request.
struct Signals {
    signals: UnboundedReceiver<EndSignal>,
    escalation: Escalation,
}

impl Signals {
    fn watch() -> std::io::Result<Self> {
        let (heard, signals) = unbounded_channel();
        signals::watch(move |signal| {
            // The receiver is gone only while this process exits.
            let _ = heard.send(signal);
        })?;
        Ok(Self {
            signals,
            escalation: Escalation::default(),
        })
    }

    async fn next(&mut self) -> Reaction {
        match self.signals.recv().await {
            Some(signal) => self.escalation.react(signal),
            // The sending thread never ends.
            None => std::future::pending().await,
        }
    }

    /// Waits until a signal requests to kill the VMMs.
    async fn kill(&mut self) {
        while self.next().await != Reaction::Kill {}
    }
}

/// Reports the daemon's state to systemd or another supervisor (`sd_notify(3)`). Runs on a thread of its own, since a
/// supervisor that does not read blocks the writer.
struct Supervisor(mpsc::Sender<NotifyState<'static>>);

impl Supervisor {
    fn start() -> std::io::Result<Self> {
        let (sender, states) = mpsc::channel();
        std::thread::Builder::new().name("notify".to_owned()).spawn(move || {
            for state in states {
                let _ = sd_notify::notify(&[state]);
            }
        })?;
        Ok(Self(sender))
    }

    fn tell(&self, state: NotifyState<'static>) {
        let _ = self.0.send(state);
    }
}
