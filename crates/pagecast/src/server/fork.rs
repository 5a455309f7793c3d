//! A handle on one fork.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::error::Error;
use super::fail_reason::FailReason;
use super::fork_id::ForkId;
use super::fork_record::ForkRecord;
use super::fork_status::{ForkState, ForkStatus};
use super::latency::LatencyHistogram;
use super::registry::Registry;

/// How long forgetting a fork that waits for its VMM waits for the thread that listens for that VMM.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A registered fork: this one, whichever fork has its name later. Dropping this changes nothing; [`forget`](Self::forget)
/// does.
#[derive(Clone)]
pub struct Fork {
    record: Arc<ForkRecord>,
    /// Gone once the server is, and all of its forks with it.
    registry: Weak<Registry>,
}

impl Fork {
    pub(super) fn new(record: Arc<ForkRecord>, registry: &Arc<Registry>) -> Self {
        Self {
            record,
            registry: Arc::downgrade(registry),
        }
    }

    /// Its name.
    pub fn id(&self) -> &ForkId {
        &self.record.id
    }

    /// Where its VMM is to connect: `backend_path` of a `mem_backend` whose `backend_type` is `Uffd`.
    pub fn socket_path(&self) -> &Path {
        &self.record.socket_path
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

    /// Begins to complete the fork and returns at once: installs what is left of its memory, then unregisters it. Its state
    /// says when that is done ([`ForkState::Complete`]). If it cannot be completed, it is served on, and both
    /// [`ForkEvent::NotCompleted`](super::ForkEvent::NotCompleted) and the [reason](ForkStatus::reason) in its status say why.
    /// Completing a fork that is complete, or about to be, changes nothing.
    ///
    /// If the memory would not suffice by what is known of the template's zeros, they are looked for first, for half a
    /// second at most.
    ///
    /// # Errors
    ///
    /// [`Error::ForkWaiting`]; [`Error::ForkEnded`] if its VMM has exited or it has failed; [`Error::NotEnoughMemory`] if
    /// completing it, beside the others that are being completed, would drive the host out of memory: try again later.
    pub fn complete(&self) -> Result<(), Error> {
        match self.registry.upgrade() {
            Some(registry) => registry.complete(&self.record),
            None => self.record.may_be_completed(self.record.state()),
        }
    }

    /// Kills the VMM of the fork and returns at once; its state says when the VMM is dead. A fork that waits for its VMM is
    /// closed instead; one that has ended stays as it is.
    pub fn kill(&self) {
        self.record.request_kill(FailReason::Killed);
    }

    /// Has the server forget the fork, so that its name is free. A fork that still waits for its VMM is closed. Forgetting it
    /// once more changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::ForkInUse`] while its VMM needs it.
    pub fn forget(&self) -> Result<(), Error> {
        if self.record.state() == ForkState::Waiting {
            self.record.request_close();
            // The acceptor ends it, or is just about to find that its VMM has connected.
            let until = Instant::now() + CLOSE_PATIENCE;
            self.record.wait_state(until, |state| state != ForkState::Waiting);
        }
        if !self.record.state().is_end() {
            return Err(Error::ForkInUse(self.record.id.clone()));
        }
        if let Some(registry) = self.registry.upgrade() {
            registry.remove(&self.record);
        }
        Ok(())
    }
}

impl fmt::Debug for Fork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fork").field(&self.status()).finish()
    }
}
