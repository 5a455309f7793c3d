//! Events of forks: reports of the page server, and the end of each fork.

use std::sync::Arc;

use pagecast::server::{ForkEvent, ForkId, chain};
use tracing::{debug, info, warn};

use super::{Service, backends};
use crate::fork::Fork;
use crate::learned;
use crate::run_dir::Saved;
use crate::vmm_process::VmmProcess;

impl Service {
    /// Acts on an event of the page server about a fork with `uffd`.
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
            // A fork that was forgotten already has no template that could learn from it.
            ForkEvent::Recorded { id, recording } => {
                if let Ok(fork) = self.registry.fork(id.as_str()) {
                    let recording = Arc::clone(recording);
                    self.runtime.spawn_blocking(move || learned::learn(&fork, &recording));
                }
            }
            ForkEvent::Prefaulted { id, tally } => {
                if let Ok(fork) = self.registry.fork(id.as_str()) {
                    learned::log_switched_off(&fork.template);
                }
                debug!(event = "fork_prefaulted", fork = %id, ?tally, "the first faults of a fork that was given its working set are over");
            }
            ForkEvent::Ended(status) => {
                // If the fork is being created or deleted, that call handles its end.
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

    /// Handles the end of a fork. It can be read until it is deleted, or `ended_forks` others have ended since.
    pub(super) fn ended(self: &Arc<Self>, ended: &Arc<Fork>) {
        let Some(forgotten) = self.registry.note_end(ended) else {
            return;
        };
        // The next daemon need not take it up.
        self.forget_saved(ended);
        Self::log_end(ended);
        for fork in &forgotten {
            self.forget(fork);
        }
    }

    /// Logs the end of a fork. Called once for each fork.
    pub(super) fn log_end(ended: &Fork) {
        let numbers = ended.stats();
        let faults = numbers.map(|stats| stats.faults.demand);
        let p99_us = numbers.map(|stats| stats.fault_latency_us.p99);
        let installed_bytes = numbers.map(|stats| stats.installed_bytes);
        let (fork, state) = (&ended.id, ended.state());
        if let Some(error) = ended.error() {
            warn!(event = "fork_ended", %fork, %state, code = error.code, error = error.message, faults, p99_us, installed_bytes, "ended");
        } else {
            info!(event = "fork_ended", %fork, %state, faults, p99_us, installed_bytes, "ended");
        }
    }

    /// Releases the resources of a fork that is no longer in the registry. Another fork may have its id by now.
    pub(super) fn forget(self: &Arc<Self>, fork: &Fork) {
        backends::of(fork).release(self, fork);
        self.forget_saved(fork);
    }

    pub(super) fn save_fork(&self, fork: &Fork, vmm: Option<&VmmProcess>) {
        let saved = vmm.map(VmmProcess::saved).transpose();
        if let Err(error) = saved.and_then(|vmm| self.run_dir.save(Saved::Fork, fork.id.as_str(), &fork.saved(vmm))) {
            warn!(fork = %fork.id, %error, "will not be found again after a restart");
        }
        // It may have ended, and its record been deleted, before this saved it.
        if fork.state().is_end() {
            self.forget_saved(fork);
        }
    }

    /// Deletes the record of a fork in the run dir, unless another fork has its id by now.
    pub(super) fn forget_saved(&self, fork: &Fork) {
        let forget = || self.run_dir.forget(Saved::Fork, fork.id.as_str());
        if let Some(Err(error)) = self.registry.unless_replaced(fork, forget) {
            warn!(fork = %fork.id, %error, "its state in the run dir cannot be deleted");
        }
    }

    /// Deletes the records of ended forks before this process ends. Otherwise the next daemon would take their VMMs for
    /// ones that have lost their page server.
    pub(crate) fn forget_ended(&self) {
        for fork in self.registry.forks() {
            if fork.state().is_end() {
                self.forget_saved(&fork);
            }
        }
    }
}
