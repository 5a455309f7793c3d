//! A fork that has been made.
//!
//! | file | holds |
//! | --- | --- |
//! | `backing` | what each backend says of a fork |
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

/// A fork, from making to deleting.
pub(crate) struct Fork {
    pub(crate) id: ForkId,
    pub(crate) template: Arc<Template>,
    /// Why its backend is the one it is.
    pub(crate) reason: String,
    pub(crate) mem_backend: MemBackend,
    pub(crate) backed_by: BackedBy,
}

/// The backend of a fork. A `match` of it belongs into this file or the service's `backends`.
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

    /// The parts that only a fork with `uffd` has.
    pub(crate) fn uffd(&self) -> Option<&UffdFork> {
        match &self.backed_by {
            BackedBy::Uffd(uffd) => Some(uffd),
            BackedBy::File(_) => None,
        }
    }

    /// The parts that only a fork with `file` has.
    pub(crate) fn file(&self) -> Option<&FileFork> {
        match &self.backed_by {
            BackedBy::File(file) => Some(file),
            BackedBy::Uffd(_) => None,
        }
    }

    /// Where it is in its life.
    pub(crate) fn state(&self) -> ForkState {
        self.backing().state()
    }

    /// Its VMM, where it is known.
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

    /// A path of the memory file that was made for this fork alone.
    pub(crate) fn placement(&self) -> Option<&Placement> {
        self.backing().placement()
    }

    /// Whether its VMM would wait for ever without this daemon.
    pub(crate) fn needs_daemon(&self) -> bool {
        self.backing().needs_daemon()
    }

    /// What tells whether it is idle. `None` while the page server does not serve it.
    pub(crate) fn activity(&self) -> Option<Activity> {
        self.backing().activity()
    }

    /// What has happened to it so far.
    pub(crate) fn numbers(&self) -> Numbers {
        self.backing().numbers()
    }

    /// What the page server has counted of it.
    pub(crate) fn stats(&self) -> Option<ForkStats> {
        Some(self.uffd()?.served.status().stats)
    }

    /// Adds what its backend knows to the answer of the API.
    pub(crate) fn describe(&self, shown: &mut pagecast_client::Fork) {
        self.backing().describe(shown);
    }

    /// The answer to whoever asked for it.
    pub(crate) fn created(&self) -> CreatedFork {
        CreatedFork {
            id: self.id.to_string(),
            template: self.template.name.to_string(),
            backend: self.backend(),
            reason: self.reason.clone(),
            mem_backend: self.mem_backend.clone(),
        }
    }

    /// What is kept of it in the run dir.
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

/// What is kept of a fork in the run dir, to be found again after a restart.
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
    /// Whether its VMM waits for ever since the daemon that kept this has died.
    pub(crate) fn needed_daemon(&self) -> bool {
        self.backend != Backend::File
    }
}

/// Firecracker's object of this name.
pub(crate) fn mem_backend(backend_type: BackendType, path: &Path) -> MemBackend {
    MemBackend {
        backend_type,
        backend_path: path.to_owned(),
    }
}
