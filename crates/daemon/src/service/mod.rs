//! The calls of the daemon, without HTTP: adding, describing and removing templates and forks.
//!
//! | file | holds |
//! | --- | --- |
//! | `registry` | the templates and forks, by name, under one lock |
//! | `totals` | counters of forks, summed by template |
//! | `templates` | calls on templates |
//! | `forks` | calls on forks |
//! | `backends` | the parts that differ by backend: `uffd` and `file` |
//! | `events` | reports of the page server, and the end of each fork |
//! | `describe` | templates and forks as the API shows them |
//! | `warm` | templates in memory ahead of their forks |
//! | `loading` | threads that read templates into memory |
//! | `guard` | the end of forks when their template changes |
//! | `untracked` | VMMs found by the memory file that they map |
//! | `idle` | completion of forks without page faults |
//! | `overdue` | the end of forks with `file` whose VMM was not found in time |
//! | `restore` | templates and forks taken up at start-up |
//! | `refusal` | errors of the API |
//!
//! Calls may wait for disks and for processes to die, so they run on threads that may block. Names are taken first,
//! used afterwards, and released on failure. So a call that waits holds at most two locks, which only such calls take.
//! One is that of protecting files, the other a template's lock for requests to warm it.

mod backends;
mod describe;
mod events;
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
mod untracked;
mod warm;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pagecast::server::Server;
use pagecast_client::health::Health;
use pagecast_client::{ApiError, ErrorCode};

use self::refusal::refuse;
pub(crate) use self::registry::{Registry, Snapshot};
pub(crate) use self::totals::{BACKENDS, Reasons, TemplateTotals, Totals};
use crate::config::Config;
use crate::exit_watch::ExitWatch;
use crate::run_dir::RunDir;

/// Time that forks have to complete when the service is dropped, before their VMMs are killed.
const DROP_TIMEOUT: Duration = Duration::from_secs(30);

/// The daemon's templates and forks.
pub(crate) struct Service {
    config: Config,
    run_dir: RunDir,
    server: Server,
    exits: ExitWatch,
    registry: Registry,
    /// Held from planning the protection of a file until its template is in the registry, since several templates may
    /// share a file.
    protecting: Mutex<()>,
    closing: AtomicBool,
    /// `true` once all templates and forks of an earlier daemon are taken up, so that broken leases can be acted on.
    acts_on_leases: AtomicBool,
    /// Threads that end the forks of changed templates.
    withdrawals: Mutex<Vec<JoinHandle<()>>>,
    /// Notified when a fork is created: its template may have to be watched.
    fork_made: tokio::sync::Notify,
    /// Notified when a fork with `uffd` is served: it may become idle.
    fork_serving: tokio::sync::Notify,
    /// Notified when a fork with `file` waits for its VMM: it may become overdue.
    file_fork_waits: tokio::sync::Notify,
    started: Instant,
    /// The runtime whose blocking threads do slow work.
    runtime: tokio::runtime::Handle,
}

impl Service {
    pub(crate) fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Returns the answer to `/v1/health`.
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

    /// Returns the time since the start of the daemon.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Returns the most forks that may wait or live at once.
    pub(crate) fn max_forks(&self) -> usize {
        self.config.max_forks
    }

    /// Returns an error while the daemon is stopping.
    fn check_open(&self) -> Result<(), ApiError> {
        if self.closing.load(Ordering::SeqCst) {
            return Err(refuse(ErrorCode::Closing, "the daemon is stopping"));
        }
        Ok(())
    }

    /// Sets whether new templates and forks are refused, since the daemon is stopping.
    pub(crate) fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::SeqCst);
    }

    /// Checks a path for a socket or memory file: absolute, without `..`, and in a folder that the configuration
    /// allows. Returns it with its folder resolved.
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
}

impl Drop for Service {
    /// Completes its forks, or kills their VMMs, and deletes the records of ended ones.
    fn drop(&mut self) {
        for template in self.registry.templates() {
            if let Some(file) = &template.file {
                file.warmth.end();
            }
        }
        if self.server.close(DROP_TIMEOUT).is_err() {
            let _ = self.server.kill(DROP_TIMEOUT);
        }
        self.forget_ended();
    }
}
