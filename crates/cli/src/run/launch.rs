//! One fork, from its creation to its end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pagecast_client::fork::MemBackend;
use pagecast_client::{Backend, CreateFork, CreatedFork, ErrorCode};
use pagecast_command::harmless;
use pagecast_firecracker::{Console, Jailer, Vmm, VmmError};
use tokio::sync::{mpsc, watch};

use super::drives::{Loaded, WritableFiles, open_for_writing};
use super::jail::{MEM_FILE, UFFD_SOCKET};
use super::plan::Plan;
use super::{advice, exec};
use crate::daemon::DaemonError;

/// How far the forks of a run may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Start Firecracker and wait. The time and load of that have nothing to do with the template.
    Start,
    /// Create the fork at the daemon and load, all forks at once.
    Fork,
    /// Resume, all forks at once.
    Resume,
    /// End.
    End,
}

/// A step in the life of a fork.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Its Firecracker waits for the snapshot.
    Started { pid: i32 },
    /// The daemon has created the fork.
    Created(CreatedFork),
    /// Firecracker has loaded the snapshot.
    Loaded { load: Duration, vm: Loaded },
    /// Its guest runs.
    Resumed { resume: Duration },
    /// The guest will never run, for this reason.
    Failed(LaunchError),
    /// Firecracker has ended by itself.
    Ended(VmmError),
}

/// An event of the fork with this number.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) number: usize,
    pub(crate) turn: Turn,
}

/// Why a fork does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error("{error}{last_words}")]
    Vmm {
        /// The error with its causes.
        error: String,
        last_words: String,
    },
}

/// The snapshot to load, by the paths that Firecracker sees.
#[derive(Debug)]
struct Snapshot {
    vmstate: PathBuf,
    mem_backend: MemBackend,
}

/// Whether the daemon knows a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// The daemon may know it.
    Perhaps,
    /// The daemon does not know it, or the fork with its ID is not ours.
    No,
}

/// A fork of a run.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) number: usize,
    pub(crate) id: String,
    /// To be created, in the folder of the run.
    pub(crate) folder: PathBuf,
    pub(crate) stage: watch::Receiver<Stage>,
    pub(crate) events: mpsc::UnboundedSender<Event>,
}

impl Launch {
    /// Runs the fork until its end, at the latest [`Stage::End`]. Firecracker has ended then. The daemon's fork is
    /// removed at the end of the run.
    pub(crate) async fn live(mut self, plan: &Plan) -> Registered {
        let mut registered = Registered::No;
        if let Some((program, jailer)) = &plan.jailer {
            if let Err(error) = self.live_in_jail(plan, program, jailer, &mut registered).await {
                self.tell(Turn::Failed(error));
            }
            return registered;
        }
        let command = exec::command(&plan.firecracker.path);
        match Vmm::start(command, &self.id, &self.folder, Console::File, plan.patience) {
            Ok(vmm) => self.live_as(plan, vmm, None, &mut registered).await,
            Err(error) => self.tell(Turn::Failed(failed(error, None))),
        }
        registered
    }

    /// The fork is created before the jailer starts, since the daemon puts files into the jail.
    async fn live_in_jail(
        &mut self,
        plan: &Plan,
        program: &Path,
        jailer: &Jailer,
        registered: &mut Registered,
    ) -> Result<(), LaunchError> {
        let prepared = jailer
            .jail(&plan.firecracker.path, &self.id)
            .and_then(|jail| Ok((jail.copy_vmstate(&plan.vmstate)?, jail)));
        let (vmstate, jail) = prepared.map_err(|source| {
            let folder = self.folder.clone();
            failed(VmmError::Folder { folder, source }, None)
        })?;
        let to_uffd = CreateFork {
            socket_path: Some(jail.root().join(UFFD_SOCKET)),
            uid: Some(jailer.uid()),
            gid: Some(jailer.gid()),
            ..self.wanted(plan)
        };
        let to_file = CreateFork {
            path: Some(jail.root().join(MEM_FILE)),
            ..self.wanted(plan)
        };
        let created = match plan.wanted.backend {
            Some(Backend::Uffd) => self.create(plan, &to_uffd, registered).await?,
            Some(Backend::File) => self.create(plan, &to_file, registered).await?,
            Some(Backend::Auto) | None => match self.create(plan, &to_file, registered).await {
                // The template or a setting needs `uffd`, which takes no path.
                Err(error) if error.is(ErrorCode::InvalidField) => self.create(plan, &to_uffd, registered).await?,
                created => created?,
            },
        };
        if *self.stage.borrow() == Stage::End {
            return Ok(());
        }
        // If the run ends here, processes that the jailer has started are killed with the folder of the run.
        let start = Vmm::start_in(&jail, exec::command(program), Console::File, plan.patience);
        let Some(started) = self.unless_ended(start).await else {
            return Ok(());
        };
        let vmm = started.map_err(|error| failed(error, None))?;
        let snapshot = Snapshot {
            mem_backend: MemBackend {
                backend_path: jail.inside(&created.backend_path),
                ..created
            },
            vmstate,
        };
        self.live_as(plan, vmm, Some(snapshot), registered).await;
        Ok(())
    }

    /// Runs a started Firecracker until its end. A jailed one already has a fork.
    async fn live_as(&mut self, plan: &Plan, vmm: Vmm, jailed: Option<Snapshot>, registered: &mut Registered) {
        if let Err(error) = self.live_with(plan, &vmm, jailed, registered).await {
            self.tell(Turn::Failed(error));
        }
        // It is our child and has not been waited for: the kernel cannot refuse.
        let _ = vmm.kill().await;
    }

    fn wanted(&self, plan: &Plan) -> CreateFork {
        CreateFork {
            id: Some(self.id.clone()),
            backend: plan.wanted.backend,
            prefault: plan.wanted.prefault,
            record: plan.wanted.record,
            ..CreateFork::of(&plan.wanted.template)
        }
    }

    async fn create(
        &mut self,
        plan: &Plan,
        fork: &CreateFork,
        registered: &mut Registered,
    ) -> Result<MemBackend, DaemonError> {
        // Not cancelled: otherwise it is unknown whether the daemon has created the fork.
        *registered = Registered::Perhaps;
        let created = plan.client.create_fork(fork).await.map_err(DaemonError::from);
        if let Err(DaemonError::Refused { .. }) = &created {
            *registered = Registered::No;
        }
        let created = created?;
        let mem_backend = created.mem_backend.clone();
        self.tell(Turn::Created(created));
        Ok(mem_backend)
    }

    async fn live_with(
        &mut self,
        plan: &Plan,
        vmm: &Vmm,
        jailed: Option<Snapshot>,
        registered: &mut Registered,
    ) -> Result<(), LaunchError> {
        let Some(listens) = self.unless_ended(vmm.listens()).await else {
            return Ok(());
        };
        listens.map_err(|error| failed(error, Some(vmm)))?;

        // Files that Firecracker inherited from us are no drives.
        let inherited = writable(vmm)?;
        self.tell(Turn::Started { pid: vmm.pid() });
        tokio::select! {
            // An error means that the sender has gone.
            _ = self.stage.wait_for(|stage| *stage >= Stage::Fork) => {}
            error = vmm.ended() => return Err(failed(error, Some(vmm))),
        }
        if *self.stage.borrow() == Stage::End {
            return Ok(());
        }

        let is_jailed = jailed.is_some();
        let snapshot = if let Some(snapshot) = jailed {
            snapshot
        } else {
            let fork = CreateFork {
                pid: Some(vmm.pid()),
                ..self.wanted(plan)
            };
            Snapshot {
                vmstate: plan.vmstate.clone(),
                mem_backend: self.create(plan, &fork, registered).await?,
            }
        };
        let load = vmm.load(&snapshot.vmstate, &snapshot.mem_backend, false);
        let Some(loaded) = self.unless_ended(load).await else {
            return Ok(());
        };
        let load = match loaded {
            Ok(load) => load,
            Err(error) => {
                let mut error = failed(error, Some(vmm));
                if let LaunchError::Vmm { error, .. } = &mut error {
                    *error += advice::on_failed_load(error, is_jailed);
                }
                return Err(self.with_the_daemons_word(error, plan).await);
            }
        };
        let mut writable = writable(vmm)?;
        writable.retain(|id, _| !inherited.contains_key(id));
        self.tell(Turn::Loaded {
            load,
            vm: Loaded {
                id: self.id.clone(),
                pid: vmm.pid(),
                writable,
            },
        });
        tokio::select! {
            _ = self.stage.wait_for(|stage| *stage >= Stage::Resume) => {}
            error = vmm.ended() => return Err(failed(error, Some(vmm))),
        }
        let Some(resumed) = self.unless_ended(vmm.resume()).await else {
            return Ok(());
        };
        let resume = resumed.map_err(|error| failed(error, Some(vmm)))?;
        self.tell(Turn::Resumed { resume });

        if let Some(error) = self.unless_ended(vmm.ended()).await {
            self.tell(Turn::Ended(error));
        }
        Ok(())
    }

    /// `None` if the run ends first.
    async fn unless_ended<T>(&self, step: impl Future<Output = T>) -> Option<T> {
        let mut stage = self.stage.clone();
        tokio::select! {
            biased;
            _ = stage.wait_for(|stage| *stage == Stage::End) => None,
            done = step => Some(done),
        }
    }

    /// Adds the daemon's reason to a failed load. Firecracker knows only that its page server has gone.
    async fn with_the_daemons_word(&self, error: LaunchError, plan: &Plan) -> LaunchError {
        let fork = self.unless_ended(plan.client.fork(&self.id)).await;
        match (error, fork) {
            (LaunchError::Vmm { error, last_words }, Some(Ok(fork))) => {
                let word = fork
                    .error
                    .map(|error| format!("\n  the daemon says: {}", harmless(&error.message)));
                LaunchError::Vmm {
                    error: error + &word.unwrap_or_default(),
                    last_words,
                }
            }
            (error, _) => error,
        }
    }

    fn tell(&self, turn: Turn) {
        // The receiver is gone only while the run ends.
        let _ = self.events.send(Event {
            number: self.number,
            turn,
        });
    }
}

fn writable(vmm: &Vmm) -> Result<WritableFiles, LaunchError> {
    open_for_writing(vmm.pid()).map_err(|error| LaunchError::Vmm {
        error: format!("cannot tell which files Firecracker has open for writing: {error}"),
        last_words: vmm.last_words(),
    })
}

fn failed(error: VmmError, vmm: Option<&Vmm>) -> LaunchError {
    LaunchError::Vmm {
        error: format!("{:#}", anyhow::Error::from(error)),
        last_words: vmm.map(Vmm::last_words).unwrap_or_default(),
    }
}
