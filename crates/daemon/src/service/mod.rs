//! What the daemon does, without HTTP: templates and forks, added, described and removed.
//!
//! | file | holds |
//! | --- | --- |
//! | `registry` | the templates and forks, by name, under one lock |
//! | `totals` | what has happened to forks, added up by template |
//! | `templates` | calls on templates |
//! | `forks` | calls on forks |
//! | `backends` | what depends on the backend of a fork: `uffd` and `file` |
//! | `describe` | what is said of them |
//! | `warm` | templates in memory ahead of their forks |
//! | `loading` | threads that read templates into memory |
//! | `guard` | what happens when a template changes |
//! | `idle` | forks that are completed because they have no faults any more |
//! | `overdue` | forks with `file` whose VMM has not come |
//! | `restore` | what is found in the run dir at the start |
//! | `refusal` | what went wrong, as the API says it |
//!
//! Calls may wait for disks and for processes to die, so they are made on threads that may. Names are taken first, used
//! afterwards, and given back where that fails, so no lock is held meanwhile but two that only such calls take: that of protecting
//! files, and that of asking for one template to be in memory.

mod backends;
mod describe;
mod forks;
mod guard;
mod idle;
mod loading;
mod overdue;
mod refusal;
mod registry;
mod restore;
mod templates;
#[cfg(test)]
mod tests;
mod totals;
mod warm;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pagecast::server::{ForkEvent, ForkId, Server, chain};
use pagecast_client::health::Health;
use pagecast_client::{ApiError, ErrorCode};
use tracing::{debug, info, warn};

use self::refusal::refuse;
pub(crate) use self::registry::{Registry, Snapshot};
pub(crate) use self::totals::{BACKENDS, Reasons, TemplateTotals, Totals};
use crate::config::Config;
use crate::exit_watch::ExitWatch;
use crate::fork::Fork;
use crate::learned;
use crate::run_dir::{Kind as Saved, RunDir};
use crate::vmm_process::VmmProcess;

/// How long forks may take to complete where nobody has asked for it, before they are killed.
const DROP_PATIENCE: Duration = Duration::from_secs(30);

/// The daemon's templates and forks.
pub(crate) struct Service {
    config: Config,
    run_dir: RunDir,
    server: Server,
    exits: ExitWatch,
    registry: Registry,
    /// Held from looking at how a file is protected until what that changes can be seen: several templates may be of it.
    protecting: Mutex<()>,
    closing: AtomicBool,
    /// All templates and forks of an earlier daemon were found: whoever writes one of those templates can be told from its
    /// forks.
    heeds_leases: AtomicBool,
    /// Threads that end forks of templates that change.
    withdrawals: Mutex<Vec<JoinHandle<()>>>,
    /// A fork was made: there may be a template to watch.
    fork_made: tokio::sync::Notify,
    /// A fork with `uffd` is served: it may come to be idle.
    fork_serving: tokio::sync::Notify,
    /// A fork with `file` waits for its VMM: it may come to be overdue.
    file_fork_waits: tokio::sync::Notify,
    started: Instant,
    /// Where slow work is done.
    runtime: tokio::runtime::Handle,
}

impl Service {
    pub(crate) fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// How the daemon does.
    pub(crate) fn health(&self) -> Health {
        let forks = self.registry.forks();
        let mut states = BTreeMap::new();
        for fork in &forks {
            *states.entry(fork.state()).or_default() += 1;
        }
        Health {
            status: "ok".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            templates: self.registry.templates().len() as u64,
            forks: states,
            rss_bytes: crate::process_memory::own_rss(),
        }
    }

    /// The templates and forks.
    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// For how long it has run.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// How many forks may wait or live at once.
    pub(crate) fn max_forks(&self) -> usize {
        self.config.max_forks
    }

    /// Refuses while the daemon stops.
    fn check_open(&self) -> Result<(), ApiError> {
        if self.closing.load(Ordering::SeqCst) {
            return Err(refuse(ErrorCode::Closing, "the daemon is stopping"));
        }
        Ok(())
    }

    /// Takes templates and forks again.
    pub(crate) fn take_again(&self) {
        self.closing.store(false, Ordering::SeqCst);
    }

    /// From now on takes neither templates nor forks.
    pub(crate) fn stop_taking(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Where something may be put for a VMM: absolute, without detours, and where the configuration allows it.
    fn allowed_path(&self, field: &str, path: &Path) -> Result<PathBuf, ApiError> {
        let invalid = |why: &dyn Display| {
            refuse(
                ErrorCode::PathInvalid,
                format_args!("{field} {}: {why}", path.display()),
            )
        };
        let plain = path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let (true, true, Some(folder), Some(name)) = (path.is_absolute(), plain, path.parent(), path.file_name())
        else {
            return Err(invalid(&"it must be an absolute path of a file, without `..`"));
        };
        let folder = folder
            .canonicalize()
            .map_err(|error| invalid(&format_args!("its folder cannot be used: {error}")))?;
        let allowed = &self.config.allowed_dirs;
        let within = |dir: &Path| dir.canonicalize().is_ok_and(|dir| folder.starts_with(dir));
        if !allowed.is_empty() && !within(self.run_dir.path()) && !allowed.iter().any(|dir| within(dir)) {
            let allowed: Vec<_> = allowed.iter().map(|dir| dir.display().to_string()).collect();
            return Err(invalid(&format_args!(
                "it is outside of what is allowed (the run dir, {})",
                allowed.join(", ")
            )));
        }
        Ok(folder.join(name))
    }

    /// Something happened to a fork with `uffd`.
    pub(crate) fn on_event(self: &Arc<Self>, event: &ForkEvent) {
        match event {
            ForkEvent::Serving {
                id, pid, memory_bytes, ..
            } => {
                if let Ok(fork) = self.registry.fork(id.as_str()) {
                    backends::of(&fork).note_vmm(self, &fork);
                }
                self.fork_serving.notify_one();
                info!(event = "fork_serving", fork = %id, pid, memory_bytes, "serving");
            }
            // One that is forgotten already has no template any more that could learn from it.
            ForkEvent::Recorded { id, recording } => {
                if let Ok(fork) = self.registry.fork(id.as_str()) {
                    let recording = Arc::clone(recording);
                    self.runtime.spawn_blocking(move || learned::learn(&fork, &recording));
                }
            }
            ForkEvent::Prefaulted { id, tally } => {
                if let Ok(fork) = self.registry.fork(id.as_str()) {
                    learned::tell_switched_off(&fork.template);
                }
                debug!(event = "fork_prefaulted", fork = %id, ?tally, "the first faults of a fork that was given its working set are over");
            }
            ForkEvent::Ended(status) => {
                // One that is just being made or deleted is seen to by whoever does that.
                if let Ok(fork) = self.registry.fork(status.id.as_str()) {
                    self.ended(&fork);
                }
            }
            ForkEvent::Refused {
                id,
                pid,
                refusal,
                unreported,
            } => {
                let (fork, code) = (id.as_ref().map(ForkId::as_str), refusal.code());
                info!(
                    event = "connection_refused",
                    fork,
                    pid,
                    code,
                    error = chain(refusal.as_ref()),
                    unreported,
                    "refused a connection, waits on"
                );
            }
            ForkEvent::NotCompleted { id, reason } => {
                warn!(event = "fork_not_completed", fork = %id, code = reason.code(), error = chain(reason.as_ref()), "cannot be completed, is served on");
            }
            _ => {}
        }
    }

    /// A fork has ended: it stays readable until it is deleted, or too many others have ended since.
    fn ended(self: &Arc<Self>, ended: &Arc<Fork>) {
        let Some(forgotten) = self.registry.note_end(ended) else {
            return;
        };
        self.tell_end(ended);
        for fork in &forgotten {
            self.forget(fork);
        }
    }

    /// Says how a fork has ended, once for each fork; it need not be found again after a restart.
    fn tell_end(&self, ended: &Fork) {
        let numbers = ended.stats();
        let faults = numbers.map(|stats| stats.faults.demand);
        let p99_us = numbers.map(|stats| stats.fault_latency_us.p99);
        let installed_bytes = numbers.map(|stats| stats.installed_bytes);
        let (fork, state) = (&ended.id, ended.state());
        self.forget_saved(ended);
        if let Some(error) = ended.error() {
            warn!(event = "fork_ended", %fork, %state, code = error.code, error = error.message, faults, p99_us, installed_bytes, "ended");
        } else {
            info!(event = "fork_ended", %fork, %state, faults, p99_us, installed_bytes, "ended");
        }
    }

    /// Gives back what a fork held that is off the list. Its id may be another fork's by now.
    fn forget(self: &Arc<Self>, fork: &Fork) {
        backends::of(fork).release(self, fork);
        self.forget_saved(fork);
    }

    fn save_fork(&self, fork: &Fork, vmm: Option<&VmmProcess>) {
        let saved = vmm.map(VmmProcess::saved).transpose();
        if let Err(error) = saved.and_then(|vmm| self.run_dir.save(Saved::Fork, fork.id.as_str(), &fork.saved(vmm))) {
            warn!(fork = %fork.id, %error, "will not be found again after a restart");
        }
        // It may have ended meanwhile, and been forgotten before it was saved.
        if fork.state().is_end() {
            self.forget_saved(fork);
        }
    }

    /// Forgets what is kept of a fork in the run dir, and not what is kept of another that has its id by now.
    fn forget_saved(&self, fork: &Fork) {
        let forget = || self.run_dir.forget(Saved::Fork, fork.id.as_str());
        if let Some(Err(error)) = self.registry.unless_replaced(fork, forget) {
            warn!(fork = %fork.id, %error, "cannot forget its state in the run dir");
        }
    }

    /// Forgets the forks that have ended, before this process does: the next daemon would take their VMMs for ones that
    /// have lost their server.
    pub(crate) fn forget_ended(&self) {
        for fork in self.registry.forks() {
            if fork.state().is_end() {
                self.forget_saved(&fork);
            }
        }
    }
}

impl Drop for Service {
    /// Completes its forks, or kills their VMMs, while they can still be forgotten.
    fn drop(&mut self) {
        for template in self.registry.templates() {
            template.warmth.end();
        }
        if self.server.close(DROP_PATIENCE).is_err() {
            let _ = self.server.kill(DROP_PATIENCE);
        }
        self.forget_ended();
    }
}
