//! A created fork.
//!
//! | file | holds |
//! | --- | --- |
//! | `backing` | the facts that each backend knows about a fork |
//! | `uffd`, `file` | the two backends |

mod backing;
mod file;
mod uffd;

use std::path::Path;
use std::sync::Arc;

use pagecast::server::{ForkId, ForkStats};
use pagecast_client::fork::{BackendType, ForkError, MemBackend};
use pagecast_client::{Backend, CreatedFork, ForkState};
use serde::{Deserialize, Serialize};

pub(crate) use self::backing::{Activity, Backing, Numbers};
pub(crate) use self::file::FileFork;
pub(crate) use self::uffd::UffdFork;
use crate::local_file::Place;
use crate::placement::Placement;
use crate::template::Template;
use crate::vmm_process::{SavedVmm, VmmProcess};

/// A fork, from creation to deletion.
pub(crate) struct Fork {
    pub(crate) id: ForkId,
    pub(crate) template: Arc<Template>,
    /// The reason for its backend.
    pub(crate) reason: String,
    pub(crate) mem_backend: MemBackend,
    pub(crate) backed_by: BackedBy,
}

/// The backend of a fork. Only this file and the service's `backends` may `match` it.
pub(crate) enum BackedBy {
    Uffd(UffdFork),
    File(FileFork),
}

impl Fork {
    fn backing(&self) -> &dyn Backing {
        match &self.backed_by {
            BackedBy::Uffd(uffd) => uffd,
            BackedBy::File(file) => file,
        }
    }

    /// Returns the parts that only a fork with `uffd` has.
    pub(crate) fn uffd(&self) -> Option<&UffdFork> {
        match &self.backed_by {
            BackedBy::Uffd(uffd) => Some(uffd),
            BackedBy::File(_) => None,
        }
    }

    /// Returns the parts that only a fork with `file` has.
    pub(crate) fn file(&self) -> Option<&FileFork> {
        match &self.backed_by {
            BackedBy::File(file) => Some(file),
            BackedBy::Uffd(_) => None,
        }
    }

    /// Its state.
    pub(crate) fn state(&self) -> ForkState {
        self.backing().state()
    }

    /// Its VMM, if it is known.
    pub(crate) fn vmm(&self) -> Option<Arc<VmmProcess>> {
        self.backing().vmm()
    }

    /// Why it failed, or could not be completed.
    pub(crate) fn error(&self) -> Option<ForkError> {
        self.backing().error()
    }

    /// `uffd` or `file`.
    pub(crate) fn backend(&self) -> Backend {
        self.backing().backend()
    }

    /// The path of the memory file that was created for this fork alone.
    pub(crate) fn placement(&self) -> Option<&Placement> {
        self.backing().placement()
    }

    /// Returns `true` if its VMM would hang forever without this daemon.
    pub(crate) fn needs_daemon(&self) -> bool {
        self.backing().needs_daemon()
    }

    /// Its recent activity, for the idle check. `None` while the page server does not serve it.
    pub(crate) fn activity(&self) -> Option<Activity> {
        self.backing().activity()
    }

    /// Its counters and outcome so far.
    pub(crate) fn numbers(&self) -> Numbers {
        self.backing().numbers()
    }

    /// The page server's counters of it.
    pub(crate) fn stats(&self) -> Option<ForkStats> {
        Some(self.uffd()?.served.status().stats)
    }

    /// Adds its backend's fields to the API's answer.
    pub(crate) fn describe(&self, shown: &mut pagecast_client::Fork) {
        self.backing().describe(shown);
    }

    /// The answer to the request that created it.
    pub(crate) fn created(&self) -> CreatedFork {
        CreatedFork {
            id: self.id.to_string(),
            template: self.template.name.to_string(),
            backend: self.backend(),
            reason: self.reason.clone(),
            mem_backend: self.mem_backend.clone(),
        }
    }

    /// The record of it in the run dir.
    pub(crate) fn saved(&self, vmm: Option<SavedVmm>) -> SavedFork {
        SavedFork {
            template: self.template.name.to_string(),
            backend: self.backend(),
            reason: self.reason.clone(),
            mem_backend: self.mem_backend.clone(),
            vmm,
            place: self.placement().cloned().map(Place::Done),
        }
    }
}

/// The record of a fork in the run dir, for the next daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SavedFork {
    pub(crate) template: String,
    pub(crate) backend: Backend,
    pub(crate) reason: String,
    pub(crate) mem_backend: MemBackend,
    pub(crate) vmm: Option<SavedVmm>,
    pub(crate) place: Option<Place>,
}

impl SavedFork {
    /// Returns `true` if its VMM hangs forever after the death of the daemon that saved this.
    pub(crate) fn needed_daemon(&self) -> bool {
        self.backend != Backend::File
    }
}

/// Creates Firecracker's `mem_backend` object.
pub(crate) fn mem_backend(backend_type: BackendType, path: &Path) -> MemBackend {
    MemBackend {
        backend_type,
        backend_path: path.to_owned(),
    }
}
