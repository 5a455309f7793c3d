//! A fork with `file`: the kernel answers its faults.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pagecast_client::fork::ForkError;
use pagecast_client::{Backend, ForkState};

use super::backing::{Activity, Backing, Failure, Numbers};
use crate::local_file::LocalFile;
use crate::placement::{PlaceError, Placement};
use crate::vmm_process::VmmProcess;

/// A fork with `file`: its VMM maps the memory file and never speaks to us.
pub(crate) struct FileFork {
    /// The memory file of its template.
    pub(crate) file: Arc<LocalFile>,
    /// A place of its own, where it was asked for.
    placement: Option<Placement>,
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
    has_candidate: bool,
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

impl FileFork {
    /// One whose VMM is known, or not yet.
    pub(crate) fn new(file: Arc<LocalFile>, placement: Option<Placement>, vmm: Option<Arc<VmmProcess>>) -> Self {
        Self {
            file,
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
                has_candidate: false,
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
    pub(crate) fn note_candidate(&self) {
        self.life().has_candidate = true;
    }

    /// Its VMM has not come: it has failed, or, where it may have come without being known, that has exited. `false` where
    /// it has been found meanwhile, or the fork has ended.
    pub(crate) fn give_up(&self, error: ForkError) -> bool {
        let mut life = self.life();
        if life.state != ForkState::Waiting {
            return false;
        }
        if !life.has_candidate {
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

impl Backing for FileFork {
    fn backend(&self) -> Backend {
        Backend::File
    }

    fn state(&self) -> ForkState {
        self.life().state
    }

    fn vmm(&self) -> Option<Arc<VmmProcess>> {
        self.life().vmm.clone()
    }

    fn error(&self) -> Option<ForkError> {
        self.life().error.clone()
    }

    fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    fn needs_daemon(&self) -> bool {
        // Its VMM maps a file of the kernel's.
        false
    }

    fn activity(&self) -> Option<Activity> {
        None
    }

    fn numbers(&self) -> Numbers {
        let life = self.life();
        let failure = life.error.as_ref().filter(|_| life.state == ForkState::Failed);
        Numbers {
            state: life.state,
            failure: failure.map(|error| Failure {
                code: error.code.clone(),
                is_refusal: false,
                is_kill: life.vmm.is_some(),
            }),
            served: None,
        }
    }

    fn describe(&self, shown: &mut pagecast_client::Fork) {
        shown.pid = self.vmm().map(|vmm| vmm.pid());
    }
}
