//! What the daemon does, without HTTP: templates and forks, added, described and removed.
//!
//! | file | holds |
//! | --- | --- |
//! | `registry` | the templates and forks, by name, under one lock |
//! | `totals` | what has happened to forks, added up by template |
//! | `templates` | calls on templates |
//! | `forks` | calls on forks |
//! | `backends` | what depends on the backend of a fork: `uffd` and `file` |
//! | `events` | reports of the page server, and the end of each fork |
//! | `describe` | what is said of them |
//! | `warm` | templates in memory ahead of their forks |
//! | `loading` | threads that read templates into memory |
//! | `guard` | what happens when a template changes |
//! | `untracked` | VMMs that are found by the memory file that they map |
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

/// How long forks may take to complete where nobody has asked for it, before they are killed.
const DROP_TIMEOUT: Duration = Duration::from_secs(30);

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
    /// All templates and forks of an earlier daemon were found, so a template that is to be written can be taken from its
    /// forks.
    acts_on_leases: AtomicBool,
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

    /// Refuses new templates and forks while the daemon stops, or takes them again.
    pub(crate) fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::SeqCst);
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
}

impl Drop for Service {
    /// Completes its forks, or kills their VMMs, while they can still be forgotten.
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
