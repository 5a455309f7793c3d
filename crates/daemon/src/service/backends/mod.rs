//! What the service does with a fork, by its backend: the same functions for each.

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

/// How long a killed VMM may take to die.
pub(super) const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A fork that is to be made.
pub(super) struct Order<'a> {
    pub(super) id: ForkId,
    pub(super) template: Arc<Template>,
    /// Why it gets its backend.
    pub(super) reason: String,
    pub(super) wanted: &'a CreateFork,
}

/// What the service does with a fork, from making to deleting.
pub(super) trait Lifecycle {
    /// Begins to look after the fork, which was made or found again.
    fn start(&self, service: &Arc<Service>, fork: &Arc<Fork>);

    /// Notes the VMM of the fork if the page server knows it, once.
    fn note_vmm(&self, service: &Service, fork: &Fork);

    /// Begins to complete the fork.
    fn complete(&self, fork: &Fork) -> Result<(), ApiError>;

    /// Kills the VMM, unless none is known or it has exited. Returns `false` if it does not die in time.
    fn kill(&self, service: &Arc<Service>, fork: &Arc<Fork>) -> Result<bool, ApiError>;

    /// Makes the fork one that can be deleted. Refused while its VMM lives and needs it.
    fn close(&self, fork: &Fork) -> Result<(), ApiError>;

    /// Gives back what the fork held, which is in the registry no more. Its id may be another fork's by now.
    fn release(&self, service: &Arc<Service>, fork: &Fork);
}

/// The functions for the backend of this fork.
pub(super) fn of(fork: &Fork) -> &dyn Lifecycle {
    match &fork.backed_by {
        BackedBy::Uffd(uffd) => uffd,
        BackedBy::File(file) => file,
    }
}

/// Makes a fork with this backend, which is not `auto`.
pub(super) fn make(service: &Arc<Service>, backend: Backend, order: Order<'_>) -> Result<Arc<Fork>, ApiError> {
    if backend == Backend::File {
        file::make(service, order)
    } else {
        uffd::make(service, order)
    }
}

/// Finds a fork of an earlier daemon again. Returns it if its VMM has lost the daemon that it needed, and is to be killed.
pub(super) fn find_again(service: &Arc<Service>, id: &str, saved: SavedFork) -> Option<SavedFork> {
    if saved.needed_daemon() {
        return Some(saved);
    }
    file::find_again(service, id, saved);
    None
}

impl Service {
    /// Looks for VMMs that are not known yet.
    pub(crate) fn find_vmms(self: &Arc<Self>) {
        let forks = self.registry.forks();
        uffd::find_vmms(self, &forks);
        file::find_vmms(self, &forks);
    }
}

/// The VMM of a fork that was saved, if it lives.
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
