//! A fork that has been made.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use pagecast::server::ForkId;
use pagecast_client::fork::{BackendType, ForkError, MemBackend, Prefault};
use pagecast_client::{Backend, CreatedFork, ForkState};
use serde::{Deserialize, Serialize};

use crate::placement::{PlaceError, Placement};
use crate::template::{Place, Template};
use crate::vmm_process::{Saved as SavedVmm, VmmProcess};

/// A fork, from making to deleting.
pub(crate) struct Fork {
    pub(crate) id: ForkId,
    pub(crate) template: Arc<Template>,
    /// Why its backend is the one it is.
    pub(crate) reason: String,
    pub(crate) mem_backend: MemBackend,
    pub(crate) kind: Kind,
}

/// By whom it is served.
pub(crate) enum Kind {
    /// By the page server.
    Uffd(UffdFork),
    /// By the kernel.
    File(FileFork),
}

/// A fork with `uffd`.
pub(crate) struct UffdFork {
    /// The page server knows all about it, and has it for as long as it is not forgotten.
    pub(crate) served: pagecast::server::Fork,
    /// Its VMM, once it has shaken hands: one that is complete lives on, and may have exited since.
    pub(crate) vmm: OnceLock<Arc<VmmProcess>>,
    /// What it is given ahead of its faults.
    pub(crate) prefault: Prefault,
    /// Whether they are recorded.
    pub(crate) record: bool,
    /// How many bytes were recorded, once that is over and has been learned from.
    pub(crate) recorded: OnceLock<u64>,
}

/// A fork with `file`: its VMM maps the memory file and never speaks to us.
pub(crate) struct FileFork {
    /// A place of its own, where it was asked for.
    pub(crate) placement: Option<Placement>,
    /// That place was taken away: what is at its path by now is another fork's.
    taken_away: Mutex<bool>,
    life: Mutex<FileLife>,
}

struct FileLife {
    state: ForkState,
    vmm: Option<Arc<VmmProcess>>,
    error: Option<ForkError>,
    /// When it is looked whether its VMM has come.
    deadline: Option<Instant>,
    /// A process was seen that may be its VMM.
    suspected: bool,
}

impl FileLife {
    /// An error that came first stays.
    fn end(&mut self, state: ForkState) {
        self.state = match self.error {
            Some(_) => ForkState::Failed,
            None => state,
        };
    }
}

impl Fork {
    /// Where it is in its life.
    pub(crate) fn state(&self) -> ForkState {
        match &self.kind {
            Kind::Uffd(uffd) => state_of(uffd.served.status().state),
            Kind::File(file) => file.state(),
        }
    }

    /// Its VMM, where it is known.
    pub(crate) fn vmm(&self) -> Option<Arc<VmmProcess>> {
        match &self.kind {
            Kind::Uffd(uffd) => uffd.vmm.get().cloned(),
            Kind::File(file) => file.vmm(),
        }
    }

    /// Why it failed, or could not be completed.
    pub(crate) fn error(&self) -> Option<ForkError> {
        match &self.kind {
            Kind::Uffd(uffd) => uffd.served.status().reason.as_deref().map(|reason| ForkError {
                code: reason.code().to_owned(),
                message: pagecast::server::chain(reason),
            }),
            Kind::File(file) => file.error(),
        }
    }

    /// `uffd` or `file`.
    pub(crate) fn backend(&self) -> Backend {
        match self.kind {
            Kind::Uffd(_) => Backend::Uffd,
            Kind::File(_) => Backend::File,
        }
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

    /// What is kept of it in the run dir. The VMM of one with `uffd` is known to the page server only.
    pub(crate) fn saved(&self, vmm: Option<SavedVmm>) -> SavedFork {
        SavedFork {
            template: self.template.name.to_string(),
            backend: self.backend(),
            reason: self.reason.clone(),
            mem_backend: self.mem_backend.clone(),
            vmm,
            place: match &self.kind {
                Kind::Uffd(_) => None,
                Kind::File(file) => file.placement.clone().map(Place::Done),
            },
        }
    }
}

impl FileFork {
    /// One whose VMM is known, or not yet.
    pub(crate) fn new(placement: Option<Placement>, vmm: Option<Arc<VmmProcess>>) -> Self {
        Self {
            placement,
            taken_away: Mutex::new(false),
            life: Mutex::new(FileLife {
                state: match vmm {
                    Some(_) => ForkState::Serving,
                    None => ForkState::Waiting,
                },
                vmm,
                error: None,
                deadline: None,
                suspected: false,
            }),
        }
    }

    fn life(&self) -> MutexGuard<'_, FileLife> {
        // No code that can panic runs under this lock.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes its own place, once. When this returns, the place is gone, also if another thread removed it.
    ///
    /// # Errors
    ///
    /// It is there and cannot be taken away.
    pub(crate) fn take_place_away(&self) -> Result<(), PlaceError> {
        let mut taken_away = self.taken_away.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(placement) = self.placement.as_ref().filter(|_| !*taken_away) {
            placement.remove()?;
            *taken_away = true;
        }
        Ok(())
    }

    pub(crate) fn state(&self) -> ForkState {
        self.life().state
    }

    pub(crate) fn error(&self) -> Option<ForkError> {
        self.life().error.clone()
    }

    pub(crate) fn vmm(&self) -> Option<Arc<VmmProcess>> {
        self.life().vmm.clone()
    }

    /// Its VMM was found. `false` where it has one, or has ended.
    pub(crate) fn found(&self, vmm: &Arc<VmmProcess>) -> bool {
        let mut life = self.life();
        if life.state != ForkState::Waiting {
            return false;
        }
        life.state = ForkState::Serving;
        life.vmm = Some(Arc::clone(vmm));
        true
    }

    /// It has ended. `false` where it had before.
    pub(crate) fn end(&self, state: ForkState) -> bool {
        let mut life = self.life();
        if life.state.is_end() {
            return false;
        }
        life.end(state);
        true
    }

    /// When it is to be looked whether its VMM has come; never, where this is `None`.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.life().deadline
    }

    pub(crate) fn set_deadline(&self, deadline: Option<Instant>) {
        self.life().deadline = deadline;
    }

    /// A process was seen that may be its VMM, and cannot be told from those of others.
    pub(crate) fn suspect(&self) {
        self.life().suspected = true;
    }

    /// Its VMM has not come: it has failed, or, where it may have come without being known, that has exited. `false` where
    /// it has been found meanwhile, or the fork has ended.
    pub(crate) fn give_up(&self, error: ForkError) -> bool {
        let mut life = self.life();
        if life.state != ForkState::Waiting {
            return false;
        }
        if !life.suspected {
            life.error.get_or_insert(error);
        }
        life.end(ForkState::Exited);
        true
    }

    /// Why it is about to end: its VMM is being killed.
    pub(crate) fn fail_when_dead(&self, error: ForkError) {
        self.life().error.get_or_insert(error);
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

/// The state, in the words of the API.
pub(crate) fn state_of(state: pagecast::server::ForkState) -> ForkState {
    use pagecast::server::ForkState as Served;
    match state {
        Served::Waiting => ForkState::Waiting,
        Served::Serving => ForkState::Serving,
        Served::Complete => ForkState::Complete,
        Served::Exited => ForkState::Exited,
        Served::Failed => ForkState::Failed,
    }
}

/// Firecracker's object of this name.
pub(crate) fn mem_backend(backend_type: BackendType, path: &std::path::Path) -> MemBackend {
    MemBackend {
        backend_type,
        backend_path: path.to_owned(),
    }
}
