//! What happens when a template changes: nobody gets a wrong byte.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pagecast::server::chain;
use pagecast::template::{MemFile, PageSource};
use pagecast_client::fork::ForkError;
use pagecast_client::{Backend, ForkState};
use tracing::{error, info, warn};

use super::Service;
use crate::fork::{Fork, Kind};
use crate::inode::InodeId;
use crate::placement::Placement;
use crate::template::Template;
use crate::vmm_process::{self, VmmError, VmmProcess};

/// How often templates are compared that have no lease, while forks of them live.
const WATCH_PACE: Duration = Duration::from_secs(1);

/// How long forks with `uffd` may take to complete or to die while somebody waits to write their template, at most.
const VACATE_PATIENCE: Duration = Duration::from_secs(40);

/// How long killed VMMs may take to die.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// How long the kernel holds up whoever breaks a lease, where it does not say.
const LEASE_BREAK_TIME: Duration = Duration::from_secs(45);

impl Service {
    /// From now on acts where somebody wants to write a template, and where somebody has wanted to since its lease was taken.
    pub(super) fn heed_leases(self: &Arc<Self>) {
        self.heeds_leases.store(true, Ordering::SeqCst);
        for template in self.templates() {
            if template.is_lease_broken() {
                self.lease_broken(&template.file);
            }
        }
    }

    /// Somebody wants to write the file of a template, which we have a lease on, and waits for us to let go. Must not block.
    pub(super) fn lease_broken(self: &Arc<Self>, file: &Arc<MemFile>) {
        // While the daemon starts, forks that live are not found yet, and would be missed.
        if !self.heeds_leases.load(Ordering::SeqCst) {
            return;
        }
        // By its file, since the name may be another template's by now. One that is just being added is looked at once it is
        // there.
        let templates = self.templates();
        let Some(template) = templates.into_iter().find(|template| Arc::ptr_eq(&template.file, file)) else {
            return;
        };
        warn!(event = "template_lease_broken", template = %template.name, "somebody opens the template for writing and is held up until no fork reads it any more");
        // Its bytes are right for as long as we have the lease, so forks can be made to do without it.
        let patience = VACATE_PATIENCE.min(lease_break_time() * 2 / 3);
        self.begin_withdrawal(&template, "somebody opens it for writing", Some(patience));
    }

    /// Takes a template away that was written while nobody looked.
    pub(super) fn withdraw_changed(self: &Arc<Self>, template: &Arc<Template>) {
        if let Some(how) = template.changed() {
            self.begin_withdrawal(template, how, None);
        }
    }

    /// Begins to end the forks of a template, once for each template; with `gently`, those that can be completed within that
    /// time live on. On a thread of its own: those of the runtime may all be waiting for somebody, and this must not.
    fn begin_withdrawal(self: &Arc<Self>, template: &Arc<Template>, how: &str, gently: Option<Duration>) {
        template.set_changed(how.to_owned());
        if !template.set_withdrawn() {
            return;
        }
        let (service, withdrawn, why) = (Arc::clone(self), Arc::clone(template), how.to_owned());
        let spawned = std::thread::Builder::new()
            .name("withdrawal".to_owned())
            .spawn(move || service.withdraw(&withdrawn, &why, gently));
        match spawned {
            Ok(thread) => {
                let mut withdrawals = self.withdrawals();
                withdrawals.retain(|earlier| !earlier.is_finished());
                withdrawals.push(thread);
            }
            Err(error) => {
                warn!(template = %template.name, %error, "no thread to end the forks of a template, whoever has noticed does it");
                self.withdraw(template, how, gently);
            }
        }
    }

    fn withdrawals(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        // No code that can panic runs under this lock.
        self.withdrawals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The threads that are ending forks now, to be waited for.
    pub(crate) fn take_withdrawals(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.withdrawals())
    }

    /// Ends every fork that would still read a template, by killing its VMM, since a wrong byte is worse; then lets go of the
    /// lease.
    fn withdraw(self: &Arc<Self>, template: &Arc<Template>, how: &str, gently: Option<Duration>) {
        if let Some(patience) = gently {
            self.server.vacate(&template.pages, how, patience);
        }
        template.end_warmth();
        let served = self.server.withdraw(&template.pages, how);
        // Whoever was told where the file is and comes only now finds nothing there.
        let mut paths: Vec<PathBuf> = template.placement.iter().map(|place| place.path().to_owned()).collect();
        if let Some(Err(error)) = template.placement.as_ref().map(Placement::remove) {
            error!(template = %template.name, error = chain(&error), "cannot be taken away from forks that come too late");
        }
        let error = ForkError {
            code: "template_changed".to_owned(),
            message: format!("the template has changed: {how}"),
        };
        let forks: Vec<Arc<Fork>> = self
            .living_forks_of(template)
            .into_iter()
            .filter(|fork| matches!(fork.kind, Kind::File(_)))
            .collect();
        self.find_vmms();
        let mut killed = Vec::new();
        for fork in &forks {
            let Kind::File(file) = &fork.kind else { continue };
            paths.extend(file.placement.as_ref().map(|place| place.path().to_owned()));
            file.fail_when_dead(error.clone());
            match file.vmm() {
                Some(vmm) => {
                    if let Err(error) = vmm.kill() {
                        error!(fork = %fork.id, %error, "cannot be killed, and may read wrong bytes");
                    }
                    killed.push((fork, vmm));
                }
                None => self.file_fork_ended(fork, ForkState::Failed),
            }
        }
        let until = Instant::now() + KILL_PATIENCE;
        for (fork, vmm) in killed {
            if vmm.wait_exited(until.saturating_duration_since(Instant::now())) {
                self.file_fork_ended(fork, ForkState::Failed);
            } else {
                error!(fork = %fork.id, pid = vmm.pid(), "was killed and does not die, and may read wrong bytes");
            }
        }
        if !self.server.wait_withdrawn(&template.pages, KILL_PATIENCE) {
            error!(template = %template.name, "a fork or a read of the template does not end");
        }
        for vmm in strangers(template, &paths) {
            warn!(event = "vmm_killed", template = %template.name, pid = vmm.pid(), "killed: it maps the template by a path of forks with `file`");
            if vmm.kill().is_err() || !vmm.wait_exited(KILL_PATIENCE) {
                error!(template = %template.name, pid = vmm.pid(), "cannot be killed, and may read wrong bytes");
            } else {
                let mut state = self.state();
                state
                    .totals
                    .count_kill(&template.name, Backend::File, "template_changed");
            }
        }
        info!(event = "template_withdrawn", template = %template.name, uffd = served, file = forks.len(), "forks of the template have been ended");
        template.release_lease();
    }

    fn living_forks_of(&self, template: &Arc<Template>) -> Vec<Arc<Fork>> {
        let mut forks = self.forks();
        forks.retain(|fork| Arc::ptr_eq(&fork.template, template) && !fork.state().is_end());
        forks
    }

    /// Compares templates without a lease with what they were, for as long as forks of them live. Blocks.
    pub(crate) async fn watch_templates(self: Arc<Self>) {
        loop {
            if self.compare_templates() {
                tokio::time::sleep(WATCH_PACE).await;
            } else {
                // Nothing to watch until a fork is made.
                self.fork_made.notified().await;
            }
        }
    }

    /// Whether there is anything to watch.
    fn compare_templates(self: &Arc<Self>) -> bool {
        let mut watched = false;
        for template in self.templates() {
            let unwatched = template.guard() == pagecast_client::template::Guard::Lease || template.is_withdrawn();
            if unwatched || self.living_forks_of(&template).is_empty() {
                continue;
            }
            watched = true;
            if let Err(error) = template.file.check_unchanged() {
                let how = chain(&error);
                error!(event = "template_changed", template = %template.name, how, "the template has changed while forks live");
                self.begin_withdrawal(&template, &how, None);
            }
        }
        watched
    }
}

/// VMMs that map the file by one of the paths that only forks are told, though nobody told us of them.
pub(super) fn strangers(template: &Template, of_forks: &[PathBuf]) -> Vec<VmmProcess> {
    let file = InodeId::from(template.file.identity().inode());
    let holders = match vmm_process::holders(file) {
        Ok(holders) => holders,
        Err(error) => {
            error!(template = %template.name, %error, "cannot find out who maps the template");
            return Vec::new();
        }
    };
    let is_fork = |paths: &[PathBuf]| paths.iter().any(|path| of_forks.iter().any(|own| leads_to(path, own)));
    let mut strangers = Vec::new();
    for holder in holders {
        match VmmProcess::open(holder.pid) {
            _ if !is_fork(&holder.paths) => {}
            // Looked at again, now that it cannot be another process any more.
            Ok(vmm) if vmm.mapped_paths(file).is_ok_and(|paths| is_fork(&paths)) => strangers.push(vmm),
            Ok(_) | Err(VmmError::NoProcess { .. }) => {}
            Err(error) => {
                error!(template = %template.name, pid = holder.pid, error = chain(&error), "maps the template, and cannot be killed");
            }
        }
    }
    strangers
}

/// Whether a path of a mapping, as the kernel tells it, is this one, which may be gone by now.
fn leads_to(mapped: &Path, path: &Path) -> bool {
    let gone = [path.as_os_str().as_encoded_bytes(), b" (deleted)"].concat();
    mapped == path || mapped.as_os_str().as_encoded_bytes() == gone
}

/// How long the kernel holds up whoever breaks a lease: the sysctl `fs.lease-break-time`.
fn lease_break_time() -> Duration {
    std::fs::read_to_string("/proc/sys/fs/lease-break-time")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map_or(LEASE_BREAK_TIME, Duration::from_secs)
}
