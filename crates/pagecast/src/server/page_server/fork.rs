//! A handle on one fork.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::server::error::Error;
use crate::server::fork::{FailReason, ForkId, ForkState, ForkStatus, LatencyHistogram};
use crate::server::registry::{ForkRecord, Registry};

/// How long [`Fork::forget`] waits for the acceptor to end a fork that waits for its VMM.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// A registered fork: always this one, even if another fork gets its name later. Dropping this changes nothing;
/// [`forget`](Self::forget) does.
#[derive(Clone)]
pub struct Fork {
    record: Arc<ForkRecord>,
    /// Gone once the server and all its forks are.
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

    /// The path that its VMM must connect to: `backend_path` of a `mem_backend` whose `backend_type` is `Uffd`.
    pub fn socket_path(&self) -> &Path {
        &self.record.socket_path
    }

    /// The status of the fork.
    pub fn status(&self) -> ForkStatus {
        self.record.status()
    }

    /// The number of connections to its socket that were refused without ending it, by the [code](crate::server::Refusal::code)
    /// of the reason: probes, health checks, other users.
    pub fn refusals(&self) -> BTreeMap<&'static str, u64> {
        self.record.refusals()
    }

    /// From reading each fault until its page is installed.
    pub fn fault_latency(&self) -> LatencyHistogram {
        self.record.counters.fault_latency.load()
    }

    /// The time of the kernel to install each page that a vCPU waited for: the part of
    /// [`fault_latency`](Self::fault_latency) that no page server can avoid.
    pub fn install_latency(&self) -> LatencyHistogram {
        self.record.counters.install_latency.load()
    }

    /// Waits until the state is as `wanted`, but no longer than `patience`. Returns the status then.
    pub fn wait(&self, patience: Duration, wanted: impl Fn(ForkState) -> bool) -> ForkStatus {
        self.record.wait_state(Instant::now() + patience, wanted);
        self.record.status()
    }

    /// Begins to complete the fork and returns at once: installs the rest of its memory, then unregisters it. The state
    /// then becomes [`ForkState::Complete`]. If the fork cannot be completed, it stays served.
    /// [`ForkEvent::NotCompleted`](crate::server::ForkEvent::NotCompleted) and the [reason](ForkStatus::reason) in the status
    /// then say why. Completing a fork that is complete, or about to be, changes nothing.
    ///
    /// If the known zeros of the template leave too little memory, searches for more first, for at most half a second.
    ///
    /// # Errors
    ///
    /// [`Error::ForkWaiting`]; [`Error::ForkEnded`] if its VMM has exited or it has failed; [`Error::NotEnoughMemory`]
    /// if completing it, beside other completions, would drive the host out of memory: try again later.
    pub fn complete(&self) -> Result<(), Error> {
        match self.registry.upgrade() {
            Some(registry) => registry.complete(&self.record),
            None => self.record.may_be_completed(self.record.state()),
        }
    }

    /// Kills the VMM of the fork and returns at once; the state shows when the VMM is dead. A fork that waits for its
    /// VMM is closed instead. A fork that has ended stays as it is.
    pub fn kill(&self) {
        self.record.request_kill(FailReason::Killed);
    }

    /// Removes the fork from the server, so that its name is free. A fork that still waits for its VMM is closed. A
    /// second call changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::ForkInUse`] while its VMM needs it.
    pub fn forget(&self) -> Result<(), Error> {
        if self.record.state() == ForkState::Waiting {
            self.record.request_close();
            // The acceptor ends the fork, or is about to find that its VMM has connected.
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
