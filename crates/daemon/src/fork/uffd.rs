//! A fork with `uffd`: the page server answers its faults.

use std::sync::{Arc, OnceLock};

use pagecast::server::{FailReason, ForkState as ServedState};
use pagecast_client::fork::{ForkError, ForkRecording, Prefault};
use pagecast_client::{Backend, ForkState};

use super::backing::{Activity, Backing, Failure, Numbers, Served};
use crate::conversion;
use crate::placement::Placement;
use crate::vmm_process::VmmProcess;

/// A fork with `uffd`.
pub(crate) struct UffdFork {
    /// The page server's handle of it, valid until the fork is forgotten.
    pub(crate) served: pagecast::server::Fork,
    /// Its VMM, set after the handshake. It runs on when the fork is complete, and may have exited since.
    pub(crate) vmm: OnceLock<Arc<VmmProcess>>,
    /// The pages that are installed ahead of its faults.
    prefault: Prefault,
    /// Whether its faults are recorded.
    record: bool,
    /// Recorded bytes, set when the recording is part of the working set.
    recorded: OnceLock<u64>,
}

impl UffdFork {
    /// Creates a fork that waits for its VMM. `record` says whether its faults are recorded.
    pub(crate) fn new(served: pagecast::server::Fork, prefault: Prefault, record: bool) -> Self {
        Self {
            served,
            vmm: OnceLock::new(),
            prefault,
            record,
            recorded: OnceLock::new(),
        }
    }

    /// Notes that its recording of `bytes` is now part of the working set.
    pub(crate) fn set_recorded(&self, bytes: u64) {
        // The page server records a fork once.
        let _ = self.recorded.set(bytes);
    }
}

impl Backing for UffdFork {
    fn backend(&self) -> Backend {
        Backend::Uffd
    }

    fn state(&self) -> ForkState {
        conversion::state(self.served.status().state)
    }

    fn vmm(&self) -> Option<Arc<VmmProcess>> {
        self.vmm.get().cloned()
    }

    fn error(&self) -> Option<ForkError> {
        self.served.status().reason.as_deref().map(conversion::fail_reason)
    }

    fn placement(&self) -> Option<&Placement> {
        None
    }

    fn needs_daemon(&self) -> bool {
        !self.served.status().state.is_end()
    }

    fn activity(&self) -> Option<Activity> {
        let status = self.served.status();
        (status.state == ServedState::Serving).then_some(Activity {
            faults: status.stats.faults.demand,
            is_recorded: self.record && self.recorded.get().is_none(),
        })
    }

    fn numbers(&self) -> Numbers {
        // Read first: if the status is an end, all counters below are final.
        let status = self.served.status();
        let failure = status.reason.as_deref().filter(|_| status.state == ServedState::Failed);
        Numbers {
            state: conversion::state(status.state),
            failure: failure.map(|reason| {
                let is_refusal = matches!(reason, FailReason::Refused(_));
                Failure {
                    code: reason.code().to_owned(),
                    is_refusal,
                    // The size is known since the handshake.
                    is_kill: !is_refusal && status.memory_bytes > 0,
                }
            }),
            served: Some(Served {
                stats: status.stats,
                fault_latency: self.served.fault_latency(),
                install_latency: self.served.install_latency(),
                refusals: self.served.refusals(),
            }),
        }
    }

    fn describe(&self, shown: &mut pagecast_client::Fork) {
        let status = self.served.status();
        let counts = status.stats;
        shown.pid = status.pid;
        shown.memory_bytes = conversion::memory_bytes(&status);
        shown.faults = Some(conversion::faults(counts.faults));
        shown.fault_latency_us = Some(conversion::latency(counts.fault_latency_us));
        shown.installed_bytes = counts.installed_bytes;
        shown.given_back_bytes = counts.given_back_bytes;
        shown.prefault = Some(conversion::prefault(self.prefault, counts.prefault));
        shown.recording = self.record.then(|| ForkRecording {
            learned: self.recorded.get().is_some(),
            size_bytes: self.recorded.get().copied().unwrap_or(0),
        });
    }
}
