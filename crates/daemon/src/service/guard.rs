//! Ends the forks of a template that changes, so that none reads a wrong byte.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pagecast::server::chain;
use pagecast::template::MemFile;
use pagecast_client::fork::ForkError;
use pagecast_client::{Backend, ForkState};
use tracing::{debug, error, info, warn};

use super::Service;
use super::backends::KILL_TIMEOUT;
use super::untracked::untracked_vmms;
use crate::fork::Fork;
use crate::local_file::LocalFile;
use crate::own_thread::survive;
use crate::placement::{How, Placement};
use crate::template::Template;
use crate::validity::Forks;
use crate::vmm_process::VmmProcess;

/// Interval of comparing templates without a lease, while they have living forks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Most time that forks with `uffd` have to complete or die while a process waits to write their template.
const VACATE_TIMEOUT: Duration = Duration::from_secs(40);

/// The task name of a withdrawal, for panics in its parts.
const TASK: &str = "withdrawal";

/// Assumed time that the kernel blocks a process that breaks a lease, if the sysctl cannot be read.
const LEASE_BREAK_TIME: Duration = Duration::from_secs(45);

impl Service {
    /// Starts to act on broken leases, those broken since start-up included.
    pub(super) fn act_on_leases(self: &Arc<Self>) {
        self.acts_on_leases.store(true, Ordering::SeqCst);
        for template in self.registry.templates() {
            if let Some(file) = template.file.as_ref().filter(|file| file.is_lease_broken()) {
                self.lease_broken(&file.mem_file);
            }
        }
    }

    /// Handles a broken lease: a process waits to write the file of a template until the lease is dropped. Must not
    /// block.
    pub(super) fn lease_broken(self: &Arc<Self>, file: &Arc<MemFile>) {
        // At start-up, living forks are not taken up yet, and would be missed.
        if !self.acts_on_leases.load(Ordering::SeqCst) {
            return;
        }
        // Searched by file, since another template may have the name by now. For a template that is being added,
        // `add_template` calls this again.
        let templates = self.registry.templates();
        let is_of_it = |template: &Arc<Template>| {
            let its = template.file.as_ref();
            its.is_some_and(|its| Arc::ptr_eq(&its.mem_file, file))
        };
        let Some(template) = templates.into_iter().find(is_of_it) else {
            return;
        };
        // The bytes cannot change while the lease is held, so there is time to complete forks.
        let timeout = VACATE_TIMEOUT.min(lease_break_time() * 2 / 3);
        self.begin_withdrawal(&template, "another process opens it for writing", Some(timeout));
        warn!(event = "template_lease_broken", template = %template.name, "another process opens the template for writing, and waits until no fork reads it");
    }

    /// Ends the forks of a template that was written while no daemon ran.
    pub(super) fn withdraw_changed(self: &Arc<Self>, template: &Arc<Template>) {
        if let Some(how) = template.validity.change() {
            self.begin_withdrawal(template, &how, None);
        }
    }

    /// Starts to end the forks of a template, once for each template. With `gently`, forks that can be completed within
    /// that time live on. Runs on a thread of its own, since API calls may occupy all blocking threads of the runtime.
    pub(super) fn begin_withdrawal(self: &Arc<Self>, template: &Arc<Template>, how: &str, gently: Option<Duration>) {
        if !template.validity.invalidate(how, Forks::Ended) {
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
                self.withdraw(template, how, gently);
                warn!(template = %template.name, %error, "no thread could be started to end the forks of a template: the thread that noticed the change ended them");
            }
        }
    }

    fn withdrawals(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        // No code that can panic runs under this lock.
        self.withdrawals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the threads that are ending forks, to be joined.
    pub(crate) fn take_withdrawals(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.withdrawals())
    }

    /// Ends every fork that would still read a template, by killing its VMM, since a wrong byte is worse. Then drops
    /// the lease. The kernel blocks the writer for a limited time, so steps that do not wait come first, and log lines
    /// last.
    fn withdraw(self: &Arc<Self>, template: &Arc<Template>, how: &str, gently: Option<Duration>) {
        let mut forks = self.living_forks_of(template);
        // The page server ends those with `uffd`.
        forks.retain(|fork| fork.file().is_some());
        // Each step runs even if an earlier one panics.
        let file = template.file.as_deref();
        let (mut killed, mut removed) = (Vec::new(), None);
        if let Some(file) = file {
            killed = self.kill_mappers(template, file, &forks, how);
            // Other templates may share the file.
            survive(TASK, || self.look_before_own_change(file.inode()));
            // A VMM that opens the path only now finds no file.
            removed = survive(TASK, || file.placement.as_ref().map(Placement::remove)).flatten();
            survive(TASK, || self.note_own_change(file.inode()));
            // Not `end_warmth`, which waits for a call that is warming the template.
            survive(TASK, || file.warmth.end());
        }
        if let Some(timeout) = gently {
            survive(TASK, || self.server.vacate(&template.pages, how, timeout));
        }
        let served = survive(TASK, || self.server.withdraw(&template.pages, how));
        let left = survive(TASK, || self.await_deaths(template, killed)).unwrap_or_default();
        let all_ended = survive(TASK, || self.server.wait_withdrawn(&template.pages, KILL_TIMEOUT));
        // A process may have opened the file while its path existed, and mapped it since.
        if let Some(file) = file {
            survive(TASK, || {
                let late = kill_untracked(template, file, &places(file, &forks), &left);
                self.await_deaths(template, late);
            });
        }
        template.release_lease();
        if let Some(Err(error)) = removed {
            error!(template = %template.name, error = chain(&error), "cannot be taken away from forks that come too late");
        }
        if all_ended != Some(true) {
            error!(template = %template.name, "a fork or a read of the template does not end");
        }
        info!(event = "template_withdrawn", template = %template.name, uffd = served.unwrap_or_default(), file = forks.len(), "all forks of the template have ended");
    }

    /// Kills the VMMs of these forks with `file`, and all other processes that map the file by one of their paths. Ends
    /// forks whose VMM was never found.
    fn kill_mappers(
        self: &Arc<Self>,
        template: &Template,
        file: &LocalFile,
        forks: &[Arc<Fork>],
        how: &str,
    ) -> Vec<Killed> {
        let error = ForkError {
            code: "template_changed".to_owned(),
            message: format!("the template has changed: {how}"),
        };
        for fork in forks {
            if let Some(fork) = fork.file() {
                fork.fail_when_dead(error.clone());
            }
        }
        // Known VMMs first, since they need no search.
        let mut killed = kill_vmms(forks, &[]);
        survive(TASK, || self.find_vmms());
        let found = kill_vmms(forks, &killed);
        killed.extend(found);
        let untracked = survive(TASK, || kill_untracked(template, file, &places(file, forks), &killed));
        killed.extend(untracked.into_iter().flatten());
        for fork in forks.iter().filter(|fork| fork.vmm().is_none()) {
            self.file_fork_ended(fork, ForkState::Failed);
        }
        killed
    }

    /// Waits until the killed processes are dead. Returns those that are not.
    fn await_deaths(self: &Arc<Self>, template: &Template, mut killed: Vec<Killed>) -> Vec<Killed> {
        let until = Instant::now() + KILL_TIMEOUT;
        killed.retain(|Killed { vmm, fork }| {
            let died = vmm.wait_exited(until.saturating_duration_since(Instant::now()));
            match fork {
                Some(fork) if died => self.file_fork_ended(fork, ForkState::Failed),
                None if died => self.registry.count_kill(&template.name, Backend::File, "template_changed"),
                _ => {
                    error!(template = %template.name, pid = vmm.pid(), "was killed and does not die, and may read wrong bytes");
                }
            }
            !died
        });
        killed
    }

    fn living_forks_of(&self, template: &Arc<Template>) -> Vec<Arc<Fork>> {
        let mut forks = self.registry.forks();
        forks.retain(|fork| Arc::ptr_eq(&fork.template, template) && !fork.state().is_end());
        forks
    }

    /// Compares templates with their saved identity, while they have living forks and either no lease or hard links
    /// made for single forks. Blocks.
    pub(crate) async fn watch_templates(self: Arc<Self>) {
        loop {
            // After a panic, there may still be a template to watch.
            if survive("watch", || self.compare_templates()).unwrap_or(true) {
                tokio::time::sleep(WATCH_INTERVAL).await;
            } else {
                // There is no template to watch until a fork is created.
                self.fork_made.notified().await;
            }
        }
    }

    /// Compares them once. Returns `true` if there is a template to watch.
    fn compare_templates(self: &Arc<Self>) -> bool {
        let mut watched = false;
        for template in self.registry.templates() {
            let forks = self.living_forks_of(&template);
            let unguarded = template.guard() != pagecast_client::template::Guard::Lease;
            let linked = forks.iter().any(|fork| is_linked(fork));
            if forks.is_empty() || template.validity.is_withdrawn() || !(unguarded || linked) {
                continue;
            }
            watched = true;
            survive("watch", || {
                if let Some(how) = template.file.as_ref().and_then(|file| file.new_ownership_change()) {
                    warn!(event = "template_owner_changed", template = %template.name, how, "owner or mode of the template has changed, as by `chown -R` of a folder with a hard link of it");
                }
            });
            survive("watch", || {
                let Err(error) = template.compare() else { return };
                if !unguarded || error.may_pass() {
                    // A lease holds writers off, or this is no change: each read compares the file again.
                    debug!(template = %template.name, error = chain(&error), "the template cannot be compared now");
                    return;
                }
                let how = chain(&error);
                self.begin_withdrawal(&template, &how, None);
                error!(event = "template_changed", template = %template.name, how, "the template has changed while forks live");
            });
        }
        watched
    }
}

/// Returns `true` if the fork's path is a hard link of its template: the owner of its folder may change the template's
/// owner.
fn is_linked(fork: &Fork) -> bool {
    fork.placement().is_some_and(|place| place.how() == How::HardLink)
}

/// A process that was sent SIGKILL, and its fork, if that is known.
struct Killed {
    vmm: Arc<VmmProcess>,
    fork: Option<Arc<Fork>>,
}

/// Returns the places where these forks with `file` find the memory file.
fn places<'a>(file: &'a LocalFile, forks: &'a [Arc<Fork>]) -> Vec<&'a Placement> {
    let own = forks.iter().filter_map(|fork| fork.placement());
    file.placement.iter().chain(own).collect()
}

/// Kills the known VMMs of these forks with `file`, except those in `already`.
fn kill_vmms(forks: &[Arc<Fork>], already: &[Killed]) -> Vec<Killed> {
    let mut killed = Vec::new();
    for fork in forks {
        let Some(vmm) = fork.vmm() else { continue };
        if already.iter().any(|killed| killed.vmm.pid() == vmm.pid()) {
            continue;
        }
        if let Err(error) = vmm.kill() {
            error!(fork = %fork.id, %error, "cannot be killed, and may read wrong bytes");
        }
        killed.push(Killed {
            vmm,
            fork: Some(Arc::clone(fork)),
        });
    }
    killed
}

/// Kills the processes that map the file of a template by one of `places`, except those in `already`. Spares processes
/// that cannot be inspected, since they may have no relation to it.
fn kill_untracked(template: &Template, file: &LocalFile, places: &[&Placement], already: &[Killed]) -> Vec<Killed> {
    let untracked = match untracked_vmms(file, places) {
        Ok(untracked) => untracked,
        Err(error) => {
            error!(template = %template.name, %error, "cannot find the processes that map the template, which may read wrong bytes");
            return Vec::new();
        }
    };
    let mut vmms = untracked.vmms;
    vmms.retain(|vmm| already.iter().all(|killed| killed.vmm.pid() != vmm.pid()));
    let outcomes: Vec<_> = vmms.iter().map(VmmProcess::kill).collect();
    for (pid, why) in &untracked.unknown {
        error!(event = "vmm_unknown", template = %template.name, pid, error = %why, "a process that pagecast may not inspect may map the template, and read wrong bytes");
    }
    for (vmm, outcome) in vmms.iter().zip(outcomes) {
        warn!(event = "vmm_killed", template = %template.name, pid = vmm.pid(), "killed: it maps the template by a path of forks with `file`");
        if let Err(error) = outcome {
            error!(template = %template.name, pid = vmm.pid(), %error, "cannot be killed, and may read wrong bytes");
        }
    }
    let killed = |vmm| Killed {
        vmm: Arc::new(vmm),
        fork: None,
    };
    vmms.into_iter().map(killed).collect()
}

/// Returns how long the kernel blocks a process that breaks a lease: the sysctl `fs.lease-break-time`.
fn lease_break_time() -> Duration {
    std::fs::read_to_string("/proc/sys/fs/lease-break-time")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .map_or(LEASE_BREAK_TIME, Duration::from_secs)
}
