//! A fork with `file`: the kernel answers its faults.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pagecast_client::fork::ForkError;
use pagecast_client::{Backend, ForkState};

use super::backing::{Activity, Backing, Failure, Numbers};
use crate::local_file::LocalFile;
use crate::placement::{PlaceError, Placement};
use crate::vmm_process::VmmProcess;

/// A fork with `file`: its VMM maps the memory file and never connects to the daemon.
pub(crate) struct FileFork {
    /// The memory file of its template.
    pub(crate) file: Arc<LocalFile>,
    /// The fork's own place, if one was requested.
    placement: Option<Placement>,
    /// That place was removed. Its path may belong to another fork by now.
    taken_away: Mutex<bool>,
    life: Mutex<FileLife>,
}

struct FileLife {
    state: ForkState,
    vmm: Option<Arc<VmmProcess>>,
    error: Option<ForkError>,
    /// The time of the next search for its VMM.
    deadline: Option<Instant>,
    /// A process was found that may be its VMM.
    has_candidate: bool,
}

impl FileLife {
    /// Ends the fork: `Failed` if an error was set before, else `state`.
    fn end(&mut self, state: ForkState) {
        self.state = match self.error {
            Some(_) => ForkState::Failed,
            None => state,
        };
    }
}

impl FileFork {
    /// Creates a fork: `Serving` if `vmm` is known, else `Waiting`.
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

    /// Removes its own place, once. When this returns, the place is gone, even if another thread removed it.
    ///
    /// # Errors
    ///
    /// The place exists and cannot be removed.
    pub(crate) fn take_place_away(&self) -> Result<(), PlaceError> {
        let mut taken_away = self.taken_away.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(placement) = self.placement.as_ref().filter(|_| !*taken_away) {
            placement.remove()?;
            *taken_away = true;
        }
        Ok(())
    }

    /// Sets the VMM that was found. Returns `false` if the fork has one already, or has ended.
    pub(crate) fn found(&self, vmm: &Arc<VmmProcess>) -> bool {
        let mut life = self.life();
        if life.state != ForkState::Waiting {
            return false;
        }
        life.state = ForkState::Serving;
        life.vmm = Some(Arc::clone(vmm));
        true
    }

    /// Ends the fork. Returns `false` if it had ended before.
    pub(crate) fn end(&self, state: ForkState) -> bool {
        let mut life = self.life();
        if life.state.is_end() {
            return false;
        }
        life.end(state);
        true
    }

    /// Returns the time of the next search for its VMM; `None` for no search.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.life().deadline
    }

    pub(crate) fn set_deadline(&self, deadline: Option<Instant>) {
        self.life().deadline = deadline;
    }

    /// Notes that a process was found that may be its VMM or that of another fork.
    pub(crate) fn note_candidate(&self) {
        self.life().has_candidate = true;
    }

    /// Gives up waiting for the VMM. The fork has exited if a candidate was noted, else failed. Returns `false` if the
    /// VMM was found meanwhile, or the fork has ended.
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

    /// Sets the error with which the fork ends, since its VMM is being killed.
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
        // Its VMM maps a file, so the kernel answers its faults.
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
