//! What the owner of a server holds of each fork.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fork::{ForkId, ForkState, ForkStatus};
use super::latency::LatencyHistogram;
use super::record::ForkRecord;

/// A registered fork. Dropping this changes nothing; [`Server::unregister`](super::Server::unregister) does.
#[derive(Clone, Debug)]
pub struct Fork {
    pub(super) record: Arc<ForkRecord>,
    pub(super) socket_path: PathBuf,
}

impl Fork {
    /// Its name.
    pub fn id(&self) -> &ForkId {
        &self.record.id
    }

    /// Where its VMM is to connect: `backend_path` of a `mem_backend` whose `backend_type` is `Uffd`.
    pub fn socket_path(&self) -> &Path {
        &self.socket_path
    }

    /// What is known of it.
    pub fn status(&self) -> ForkStatus {
        self.record.status()
    }

    /// How many connections to its socket were refused without ending it, by the [code](super::Refusal::code) of the
    /// reason: probes, health checks, other users.
    pub fn refusals(&self) -> BTreeMap<&'static str, u64> {
        self.record.refusals()
    }

    /// From reading each of its faults to the page being in place.
    pub fn fault_latency(&self) -> LatencyHistogram {
        self.record.counters.fault_latency.load()
    }

    /// What the kernel took for putting in place each page that a vCPU waited for: the part of
    /// [`fault_latency`](Self::fault_latency) that no page server can do without.
    pub fn install_latency(&self) -> LatencyHistogram {
        self.record.counters.install_latency.load()
    }

    /// Waits until its state is as `wanted`, but no longer than `patience`; what is known of it then.
    pub fn wait(&self, patience: Duration, wanted: impl Fn(ForkState) -> bool) -> ForkStatus {
        self.record.wait_state(Instant::now() + patience, wanted);
        self.record.status()
    }
}
