//! Ends forks with `file` whose VMM was not found in time, such as those of a client that has died.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecast::proc_files::path_in_maps;
use pagecast_client::ForkState;
use pagecast_client::fork::ForkError;
use tracing::{error, warn};

use super::Service;
use crate::backend::GUESS;
use crate::fork::{FileFork, Fork};
use crate::own_thread::survive;
use crate::vmm_process::{self, Holder};

/// Pause before the next search for overdue forks, after a failed one.
const AGAIN: Duration = Duration::from_secs(1);

impl Service {
    /// Sets the deadline for the VMM of a fork with `file`: the `connect_deadline`, as with `uffd`.
    pub(super) fn await_vmm(&self, file: &FileFork) {
        // A deadline beyond the range of the clock is no deadline.
        file.set_deadline(Instant::now().checked_add(self.config.connect_deadline));
        self.file_fork_waits.notify_one();
    }

    /// Ends forks with `file` that are overdue. Sleeps until the next deadline.
    pub(crate) async fn end_overdue(self: Arc<Self>) {
        loop {
            let next = self
                .registry
                .forks()
                .iter()
                .filter_map(|fork| waits(fork)?.deadline())
                .min();
            let Some(next) = next else {
                self.file_fork_waits.notified().await;
                continue;
            };
            tokio::time::sleep_until(next.into()).await;
            let service = Arc::clone(&self);
            let looked = move || survive("overdue", || service.look_for_overdue());
            match tokio::task::spawn_blocking(looked).await {
                Ok(Some(())) => {}
                // The forks are still overdue.
                Ok(None) => tokio::time::sleep(AGAIN).await,
                Err(error) => {
                    return error!(%error, "the daemon stops: overdue forks with `file` no longer end");
                }
            }
        }
    }

    pub(super) fn look_for_overdue(self: &Arc<Self>) {
        let now = Instant::now();
        // Forks with a path of their own may have a VMM that was not searched for yet.
        self.find_vmms();
        let forks = self.registry.forks();
        let overdue: Vec<_> = forks
            .iter()
            .filter_map(|fork| Some((fork, waits(fork)?)))
            .filter(|(_, file)| file.deadline().is_some_and(|deadline| deadline <= now))
            .collect();
        let holders = match vmm_process::holders(&overdue.iter().map(|(_, file)| file.file.inode()).collect()) {
            Ok(holders) => holders,
            Err(error) => {
                for (_, file) in &overdue {
                    self.await_vmm(file);
                }
                return warn!(%error, "cannot find the processes that map a template");
            }
        };
        for (fork, file) in overdue {
            let unreadable = holders.may_hold(fork.template.pages.len().get()).next();
            if let Some(process) = unreadable {
                warn!(
                    event = "vmm_unknown",
                    fork = %fork.id,
                    pid = process.pid,
                    error = %process.why,
                    "a process that pagecast may not inspect may be its VMM: the fork still waits; delete it if it has no VMM"
                );
            }
            let not_mapped = format!(
                "no process has mapped its memory file within {:?}",
                self.config.connect_deadline
            );
            let mut found = holders.found.iter().filter(|holder| holder.file == file.file.inode());
            if unreadable.is_some() || found.any(|holder| may_be_its_vmm(holder, fork, file, &forks)) {
                file.note_candidate();
                self.await_vmm(file);
            } else if file.give_up(ForkError {
                code: "connect_deadline".to_owned(),
                message: if fork.template.spec.page_size_is_guess {
                    format!("{not_mapped}; {GUESS}")
                } else {
                    not_mapped
                },
            }) {
                self.file_fork_is_over(fork, file);
            }
        }
    }
}

/// Returns the fork if it is one with `file` whose VMM is not known.
fn waits(fork: &Fork) -> Option<&FileFork> {
    fork.file().filter(|_| fork.state() == ForkState::Waiting)
}

/// Returns `true` if a process that maps the template may be the VMM of this fork. It is not, if it is the VMM of
/// another fork, or has opened the file only by paths of others. A process in a mount namespace of its own has an
/// unknown path.
fn may_be_its_vmm(holder: &Holder, fork: &Fork, file: &FileFork, forks: &[Arc<Fork>]) -> bool {
    let is_known = |fork: &Arc<Fork>| fork.vmm().is_some_and(|vmm| vmm.pid() == holder.pid);
    if forks.iter().any(is_known) {
        return false;
    }
    let template = &fork.template;
    let shown = |path: &Path| path_in_maps(path).into_owned();
    let own_path = |fork: &Fork| shown(&fork.mem_backend.backend_path);
    let of_others: BTreeSet<_> = forks
        .iter()
        .filter(|other| other.template.name == template.name)
        .map(|other| own_path(other))
        .chain([shown(file.file.path()), shown(file.file.path_for_forks())])
        .filter(|path| *path != own_path(fork))
        .collect();
    holder.paths.iter().any(|path| !of_others.contains::<Path>(path))
}
