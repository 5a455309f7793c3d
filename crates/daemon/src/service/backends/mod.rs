//! Operations on forks that differ by backend, behind one trait.

mod file;
mod uffd;

use std::sync::Arc;
use std::time::Duration;

use pagecast::server::{ForkId, chain};
use pagecast_client::{ApiError, Backend, CreateFork};
use tracing::error;

pub(super) use self::uffd::{end_orphan, socket_field};
use super::Service;
use crate::fork::{BackedBy, Fork, SavedFork};
use crate::template::Template;
use crate::vmm_process::VmmProcess;

/// Time that a killed VMM has to die.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The data to create a fork.
pub(super) struct Order<'a> {
    pub(super) id: ForkId,
    pub(super) template: Arc<Template>,
    /// The reason for its backend.
    pub(super) reason: String,
    pub(super) wanted: &'a CreateFork,
}

/// The service's operations on a fork, from creation to deletion.
pub(super) trait Lifecycle {
    /// Starts to track the fork, which was created or taken up.
    fn start(&self, service: &Arc<Service>, fork: &Arc<Fork>);

    /// Notes the VMM of the fork if the page server knows it, once.
    fn note_vmm(&self, service: &Service, fork: &Fork);

    /// Starts to complete the fork.
    fn complete(&self, fork: &Fork) -> Result<(), ApiError>;

    /// Kills the VMM, unless none is known or it has exited. Returns `false` if it does not die in time.
    fn kill(&self, service: &Arc<Service>, fork: &Arc<Fork>) -> Result<bool, ApiError>;

    /// Prepares the fork for deletion. Refuses while its VMM is alive and needs it.
    fn close(&self, fork: &Fork) -> Result<(), ApiError>;

    /// Releases the resources of the fork, which is no longer in the registry. Another fork may have its id by now.
    fn release(&self, service: &Arc<Service>, fork: &Fork);
}

/// Returns the operations for the backend of this fork.
pub(super) fn of(fork: &Fork) -> &dyn Lifecycle {
    match &fork.backed_by {
        BackedBy::Uffd(uffd) => uffd,
        BackedBy::File(file) => file,
    }
}

/// Creates a fork with this backend, which is not `auto`.
pub(super) fn make(service: &Arc<Service>, backend: Backend, order: Order<'_>) -> Result<Arc<Fork>, ApiError> {
    if backend == Backend::File {
        file::make(service, order)
    } else {
        uffd::make(service, order)
    }
}

/// Takes up a fork of an earlier daemon. Returns it instead if its VMM needed that daemon, and the caller must kill it.
pub(super) fn find_again(service: &Arc<Service>, id: &str, saved: SavedFork) -> Option<SavedFork> {
    if saved.needed_daemon() {
        return Some(saved);
    }
    file::find_again(service, id, saved);
    None
}

impl Service {
    /// Searches for VMMs that are not known yet.
    pub(crate) fn find_vmms(self: &Arc<Self>) {
        let forks = self.registry.forks();
        uffd::find_vmms(self, &forks);
        file::find_vmms(self, &forks);
    }
}

/// Returns the VMM of a saved fork, if it is alive.
pub(super) fn find_vmm(id: &str, saved: &SavedFork) -> Option<Arc<VmmProcess>> {
    match saved.vmm.as_ref().map(VmmProcess::find).transpose() {
        Ok(vmm) => vmm.flatten().map(Arc::new),
        Err(error) => {
            error!(
                fork = id,
                error = chain(&error),
                "its VMM may be alive, and cannot be found"
            );
            None
        }
    }
}
