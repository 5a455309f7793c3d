//! Forks: made, completed and deleted.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pagecast::server::{ForkId, ForkOptions, ForkState as ServedState, Prefault as ServedPrefault, chain};
use pagecast_client::fork::{BackendType, CreateFork, Prefault};
use pagecast_client::template::WarmthState;
use pagecast_client::{ApiError, Backend, ErrorCode, ForkState};
use tracing::{info, warn};

use super::Service;
use super::refusal::{internal, refuse, server_refuses};
use super::templates::{changed, check, check_page_size};
use crate::backend::{Facts, choose};
use crate::fork::{FileFork, Fork, Kind, SavedFork, UffdFork, mem_backend};
use crate::inode::InodeId;
use crate::jailed;
use crate::placement::{How, PlaceError, Placement, Plan, Prefer};
use crate::run_dir::Kind as Saved;
use crate::template::{Place, Template};
use crate::vmm_process::{self, VmmProcess};
use crate::warmth;

/// How long a killed VMM may take to die.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

impl Service {
    /// Makes a fork.
    pub(crate) fn create_fork(self: &Arc<Self>, wanted: &CreateFork) -> Result<Arc<Fork>, ApiError> {
        self.check_open()?;
        if let Some(prefault @ (Prefault::WorkingSet | Prefault::All)) = wanted.prefault.filter(|_| wanted.record) {
            return Err(refuse(
                ErrorCode::InvalidField,
                format_args!(
                    "prefault: {prefault} would hide from the recording what the fork touches; leave it out, or say `none`"
                ),
            ));
        }
        let id = wanted.id.as_deref().map(str::parse::<ForkId>).transpose();
        let id = id.map_err(|error| refuse(ErrorCode::InvalidField, format_args!("id: {error}")))?;
        let taken = self.registry.take_id(&wanted.template, id)?;
        let fork = self.make_fork(taken.id.clone(), Arc::clone(&taken.template), wanted)?;
        if let Err(how) = taken.add(&fork) {
            self.forget(&fork);
            return Err(changed(&fork.template, &how));
        }
        self.start(&fork);
        self.fork_made.notify_one();
        // Its VMM may have been very quick.
        self.fork_serving.notify_one();
        info!(
            event = "fork_created",
            fork = %fork.id,
            template = %fork.template.name,
            backend = %fork.backend(),
            path = %fork.mem_backend.backend_path.display(),
            pid = fork.vmm().map(|vmm| vmm.pid()),
            "fork created"
        );
        Ok(fork)
    }

    fn make_fork(
        self: &Arc<Self>,
        id: ForkId,
        template: Arc<Template>,
        wanted: &CreateFork,
    ) -> Result<Arc<Fork>, ApiError> {
        check(&template)?;
        let page_size = match wanted.page_size {
            Some(bytes) => check_page_size(bytes)?,
            None => template.spec.page_size(),
        };
        let asked = wanted.backend.unwrap_or(self.config.backend);
        let facts = Facts {
            page_size,
            page_size_is_guess: wanted.page_size.is_none() && template.spec.page_size_is_guess,
            remote: template.remote(),
            needs_faults: match wanted.prefault {
                _ if wanted.record => Some("a recording"),
                Some(Prefault::All) => Some("a prefault of everything"),
                _ => None,
            },
            of_socket: of_socket(wanted),
            of_file: wanted.path.is_some(),
        };
        let (backend, reason) = choose(asked, facts).map_err(|why| refuse(ErrorCode::BackendUnavailable, why))?;
        check_fields(wanted, backend, &reason)?;
        match backend {
            Backend::File => self.make_file_fork(id, template, reason, wanted),
            _ => self.make_uffd_fork(id, template, reason, wanted),
        }
    }

    fn make_uffd_fork(
        &self,
        id: ForkId,
        template: Arc<Template>,
        reason: String,
        wanted: &CreateFork,
    ) -> Result<Arc<Fork>, ApiError> {
        let socket_path = match &wanted.socket_path {
            Some(path) => self.allowed_path("socket_path", path)?,
            None => self.run_dir.fork_socket(id.as_str()),
        };
        let mut options = ForkOptions::new(&socket_path);
        if let Some(uid) = wanted.uid {
            options = options.user(uid);
        }
        if let Some(gid) = wanted.gid {
            options = options.group(gid);
        }
        let prefault = match wanted.prefault {
            None if wanted.record => Prefault::None,
            prefault => prefault.unwrap_or(Prefault::WorkingSet),
        };
        options = options.prefault(match prefault {
            Prefault::None => ServedPrefault::None,
            Prefault::WorkingSet => ServedPrefault::WorkingSet,
            Prefault::All => ServedPrefault::All,
        });
        if wanted.record {
            options = options.record();
        }
        let served = self
            .server
            .register(id.clone(), &template.pages, &options)
            .map_err(|error| server_refuses(&error))?;
        Ok(Arc::new(Fork {
            id,
            template,
            reason,
            mem_backend: mem_backend(BackendType::Uffd, &socket_path),
            kind: Kind::Uffd(UffdFork {
                served,
                vmm: OnceLock::new(),
                prefault,
                record: wanted.record,
                recorded: OnceLock::new(),
            }),
        }))
    }

    fn make_file_fork(
        self: &Arc<Self>,
        id: ForkId,
        template: Arc<Template>,
        reason: String,
        wanted: &CreateFork,
    ) -> Result<Arc<Fork>, ApiError> {
        // A restart that finds it as it is now has nothing to explain.
        self.save_template(&template);
        warmth::read_ahead(&template);
        let reason = with_warmth(reason, &template);
        let vmm = wanted.pid.map(VmmProcess::open).transpose();
        let vmm = vmm
            .map_err(|error| refuse(ErrorCode::InvalidField, format_args!("pid: {}", chain(&error))))?
            .map(Arc::new);
        let mut saved = SavedFork {
            template: template.name.to_string(),
            backend: Backend::File,
            reason: reason.clone(),
            mem_backend: mem_backend(BackendType::File, &template.path_for_forks()),
            vmm: None,
            place: None,
        };
        let placement = match &wanted.path {
            Some(path) => {
                let refused = |error| refuse(ErrorCode::PathInvalid, format_args!("path: {}", chain(&error)));
                let plan = Plan::new(template.file.as_fd(), &self.allowed_path("path", path)?).map_err(refused)?;
                // Kept before it is done, so that it can be undone whatever happens.
                saved.place = Some(Place::Planned(plan.clone()));
                let kept = self.run_dir.save(Saved::Fork, id.as_str(), &saved);
                kept.map_err(|error| internal("keep the fork in the run dir", &error))?;
                self.look_before_own_change(&template.file);
                let placed = plan.carry_out(template.file.as_fd(), Prefer::Mount);
                self.note_own_change(&template.file);
                Some(placed.map_err(|error| {
                    let _ = self.run_dir.forget(Saved::Fork, id.as_str());
                    refused(error)
                })?)
            }
            None => None,
        };
        if let Some(placement) = placement.as_ref().filter(|placement| placement.how() == How::HardLink) {
            warn!(
                fork = %id,
                path = %placement.path().display(),
                "no mount can be made here (CAP_SYS_ADMIN): it is a hard link, and a change of its owner or mode is one of the template"
            );
        }
        let path = placement
            .as_ref()
            .map_or_else(|| template.path_for_forks(), |placement| placement.path().to_owned());
        Ok(Arc::new(Fork {
            id,
            template,
            reason,
            mem_backend: mem_backend(BackendType::File, &path),
            kind: Kind::File(FileFork::new(placement, vmm)),
        }))
    }

    /// Begins to look after a fork that was made or found again.
    pub(super) fn start(self: &Arc<Self>, fork: &Arc<Fork>) {
        match &fork.kind {
            // Its VMM may have been very quick.
            Kind::Uffd(_) => {
                self.vmm_connected(fork);
                if fork.state().is_end() {
                    self.ended(fork);
                }
            }
            Kind::File(file) => {
                let vmm = file.vmm();
                self.save_fork(fork, vmm.as_deref());
                match vmm {
                    Some(vmm) => self.watch(fork, &vmm),
                    None => self.await_vmm(file),
                }
            }
        }
    }

    /// Waits for the VMM of a fork with `file` to exit.
    pub(super) fn watch(self: &Arc<Self>, fork: &Arc<Fork>, vmm: &Arc<VmmProcess>) {
        let service = Arc::downgrade(self);
        let watched = Arc::clone(fork);
        let on_exit = move || {
            if let Some(service) = service.upgrade() {
                service.file_fork_ended(&watched, ForkState::Exited);
            }
        };
        if let Err(error) = self.exits.add(vmm, on_exit) {
            warn!(fork = %fork.id, %error, "its end will not be noticed");
        }
    }

    pub(super) fn file_fork_ended(self: &Arc<Self>, fork: &Arc<Fork>, state: ForkState) {
        if let Kind::File(file) = &fork.kind
            && file.end(state)
        {
            self.file_fork_is_over(fork, file);
        }
    }

    /// Takes away the place of a fork with `file`, if it has one of its own.
    pub(super) fn take_place_away(self: &Arc<Self>, fork: &Fork, file: &FileFork) {
        if let Err(error) = self.without_place(fork, file) {
            warn!(fork = %fork.id, error = chain(&error), "its memory file cannot be taken away");
        }
    }

    /// The same, without a log line. Does nothing the second time.
    fn without_place(self: &Arc<Self>, fork: &Fork, file: &FileFork) -> Result<(), PlaceError> {
        self.look_before_own_change(&fork.template.file);
        let removed = file.take_place_away();
        self.note_own_change(&fork.template.file);
        removed
    }

    pub(super) fn file_fork_is_over(self: &Arc<Self>, fork: &Arc<Fork>, file: &FileFork) {
        let removed = self.without_place(fork, file);
        self.ended(fork);
        if let Err(error) = removed {
            warn!(fork = %fork.id, error = chain(&error), "its memory file cannot be taken away");
        }
    }

    /// Begins to complete a fork.
    pub(crate) fn complete_fork(&self, id: &str) -> Result<(), ApiError> {
        let fork = self.registry.fork(id)?;
        match fork.kind {
            Kind::Uffd(_) => self.server.complete(&fork.id).map_err(|error| server_refuses(&error)),
            Kind::File(_) => Err(refuse(
                ErrorCode::NotCompletable,
                format_args!("fork {id} has the backend `file`: its VMM does without the daemon anyway"),
            )),
        }
    }

    /// Deletes a fork; with `kill`, its VMM is killed first.
    pub(crate) fn remove_fork(self: &Arc<Self>, id: &str, kill: bool) -> Result<(), ApiError> {
        self.find_vmms();
        let fork = self.registry.fork(id)?;
        if kill {
            self.kill_vmm(&fork)?;
        }
        match &fork.kind {
            // One that waits for its VMM is closed by this.
            Kind::Uffd(uffd) => self
                .server
                .unregister_this(&uffd.served)
                .map_err(|error| server_refuses(&error))?,
            Kind::File(file) if file.state() == ForkState::Serving => {
                return Err(refuse(
                    ErrorCode::ForkInUse,
                    format_args!("the VMM of fork {id} lives: end it first, or delete the fork with kill=true"),
                ));
            }
            Kind::File(_) => {}
        }
        // Somebody else may have deleted it and made another of this id.
        let Some(told) = self.registry.remove_fork(&fork) else {
            return Ok(());
        };
        if fork.state().is_end() && !told {
            self.tell_end(&fork);
        }
        match fork.kind {
            Kind::Uffd(_) => self.forget_saved(&fork),
            Kind::File(_) => self.forget(&fork),
        }
        info!(event = "fork_deleted", fork = id, "fork deleted");
        Ok(())
    }

    /// Kills the VMM of a fork and waits for its end.
    pub(super) fn kill_vmm(self: &Arc<Self>, fork: &Arc<Fork>) -> Result<(), ApiError> {
        let died = match &fork.kind {
            Kind::Uffd(uffd) if fork.state() != ForkState::Complete => {
                self.server.kill_this(&uffd.served);
                uffd.served.wait(KILL_PATIENCE, ServedState::is_end).state.is_end()
            }
            // The page server has let it go.
            Kind::Uffd(uffd) => match uffd.vmm.get() {
                Some(vmm) => {
                    vmm.kill().map_err(|error| internal("kill the VMM", &error))?;
                    vmm.wait_exited(KILL_PATIENCE)
                }
                None => true,
            },
            Kind::File(file) => match file.vmm() {
                Some(vmm) => {
                    vmm.kill().map_err(|error| internal("kill the VMM", &error))?;
                    let died = vmm.wait_exited(KILL_PATIENCE);
                    if died {
                        self.file_fork_ended(fork, ForkState::Exited);
                    }
                    died
                }
                None => true,
            },
        };
        if died {
            return Ok(());
        }
        Err(refuse(
            ErrorCode::ForkInUse,
            format_args!(
                "the VMM of fork {} was killed and has not died within {KILL_PATIENCE:?}",
                fork.id
            ),
        ))
    }

    /// Looks for VMMs that are not known yet. Of forks with `file` whose pid was not told, those that map the file by the
    /// path that was made for that fork alone, in a jail too.
    pub(crate) fn find_vmms(self: &Arc<Self>) {
        let mut waiting = Vec::new();
        for fork in self.registry.forks() {
            match &fork.kind {
                // Its event may still be on its way.
                Kind::Uffd(uffd) if uffd.vmm.get().is_none() && fork.state() == ForkState::Serving => {
                    self.vmm_connected(&fork);
                }
                Kind::File(file) if file.placement.is_some() && file.state() == ForkState::Waiting => {
                    waiting.push(fork);
                }
                _ => {}
            }
        }
        if waiting.is_empty() {
            return;
        }
        // All processes are looked at once, however many forks wait.
        let holders = match vmm_process::holders(&waiting.iter().map(|fork| inode(fork)).collect()) {
            Ok(holders) => holders,
            Err(error) => return warn!(%error, "cannot find out who maps a template"),
        };
        for fork in waiting {
            let Kind::File(file) = &fork.kind else { continue };
            let is_it = |pid, paths: &[PathBuf]| {
                let place = file.placement.as_ref().map(Placement::path);
                place.is_some_and(|place| paths.iter().any(|path| jailed::is_at(pid, path, place)))
            };
            let vmm = holders
                .found
                .iter()
                .filter(|holder| holder.file == inode(&fork) && is_it(holder.pid, &holder.paths))
                .filter_map(|holder| VmmProcess::open(holder.pid).ok())
                // Looked at again, now that it cannot be another process any more.
                .find(|vmm| {
                    let paths = vmm.mapped_paths(inode(&fork));
                    paths.is_ok_and(|paths| is_it(vmm.pid(), &paths))
                });
            if let Some(vmm) = vmm.map(Arc::new)
                && file.found(&vmm)
            {
                self.save_fork(&fork, Some(&vmm));
                self.watch(&fork, &vmm);
                info!(event = "fork_serving", fork = %fork.id, pid = vmm.pid(), "VMM found");
            }
        }
    }
}

/// The memory file of a fork's template.
pub(super) fn inode(fork: &Fork) -> InodeId {
    fork.template.file.identity().inode().into()
}

/// The field of a request that says something of a socket.
fn of_socket(wanted: &CreateFork) -> Option<&'static str> {
    [
        ("socket_path", wanted.socket_path.is_some()),
        ("uid", wanted.uid.is_some()),
        ("gid", wanted.gid.is_some()),
    ]
    .into_iter()
    .find_map(|(field, given)| given.then_some(field))
}

/// Refuses what the backend that was chosen would have to pass over.
fn check_fields(wanted: &CreateFork, backend: Backend, reason: &str) -> Result<(), ApiError> {
    let why = match (backend, of_socket(wanted)) {
        (Backend::Uffd, socket) if wanted.path.is_some() => match socket {
            Some(field) => format!("path: it takes `file`, and {field} takes `uffd`; leave one of them out"),
            None => format!(
                "path: a fork with `uffd` gets a socket, not a file; use socket_path. It has `uffd` because {reason}"
            ),
        },
        (Backend::File, Some("socket_path")) => {
            "socket_path: a fork with `file` has no socket; use path, or `uffd`".to_owned()
        }
        // The memory file is the template's own inode, so it cannot be given to anybody.
        (Backend::File, Some(field)) => format!(
            "{field}: with `file` the memory file keeps the owner and mode of the template; let the VMM's user read that \
             and leave {field} out, or use `uffd`"
        ),
        _ => return Ok(()),
    };
    Err(refuse(ErrorCode::InvalidField, why))
}

/// Says beside the reason for `file` what was done ahead of the fork.
fn with_warmth(reason: String, template: &Template) -> String {
    match template.warmth.told() {
        Some(told) if told.state == WarmthState::Warm => {
            let stays = if told.resident { ", where it stays" } else { "" };
            let (read, huge) = (told.read_bytes, told.huge_bytes);
            format!(
                "{reason}; {read} bytes of it were brought into memory ahead{stays}, {huge} of them in pages of 2 MiB"
            )
        }
        _ => reason,
    }
}
