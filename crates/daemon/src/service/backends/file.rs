//! Forks with `file`. Their VMMs map the memory file, and the page server does not know them.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use pagecast::server::chain;
use pagecast_client::fork::BackendType;
use pagecast_client::template::WarmthState;
use pagecast_client::{ApiError, Backend, ErrorCode, ForkState};
use tracing::{info, warn};

use super::{KILL_TIMEOUT, Lifecycle, Order, find_vmm, socket_field};
use crate::fork::{BackedBy, Backing as _, FileFork, Fork, SavedFork, mem_backend};
use crate::jailed;
use crate::local_file::{LocalFile, Place};
use crate::placement::{How, PlaceError, Placement, PlannedPlacement, Prefer};
use crate::run_dir::Saved;
use crate::service::refusal::{internal, refuse};
use crate::service::{Service, loading};

use crate::vmm_process::{self, VmmProcess};

/// Refuses fields that only `uffd` has.
fn check_fields(order: &Order<'_>) -> Result<(), String> {
    match socket_field(order.wanted) {
        None => Ok(()),
        Some("socket_path") => Err("socket_path: a fork with `file` has no socket; use path, or `uffd`".to_owned()),
        // The memory file is the template's own inode, so its owner cannot be changed.
        Some(field) => Err(format!(
            "{field}: with `file` the memory file keeps the owner and mode of the template; let the VMM's user read that \
             and leave {field} out, or use `uffd`"
        )),
    }
}

pub(super) fn make(service: &Arc<Service>, order: Order<'_>) -> Result<Arc<Fork>, ApiError> {
    check_fields(&order).map_err(|why| refuse(ErrorCode::InvalidField, why))?;
    let file = order.template.file.clone().ok_or_else(|| {
        let why = format_args!("template {} is no file", order.template.name);
        refuse(ErrorCode::BackendUnavailable, why)
    })?;
    let Order {
        id,
        template,
        reason,
        wanted,
    } = order;
    // Saved, so that after a restart the file's current ctime counts as unchanged.
    service.save_template(&template);
    loading::read_ahead(&template, &file);
    let reason = with_warmth(reason, &file);
    let vmm = wanted.pid.map(VmmProcess::open).transpose();
    let vmm = vmm
        .map_err(|error| refuse(ErrorCode::InvalidField, format_args!("pid: {}", chain(&error))))?
        .map(Arc::new);
    let mut saved = SavedFork {
        template: template.name.to_string(),
        backend: Backend::File,
        reason: reason.clone(),
        mem_backend: mem_backend(BackendType::File, file.path_for_forks()),
        vmm: None,
        place: None,
    };
    let placement = match &wanted.path {
        Some(path) => {
            let refused = |error| refuse(ErrorCode::PathInvalid, format_args!("path: {}", chain(&error)));
            let plan =
                PlannedPlacement::new(file.mem_file.as_fd(), &service.allowed_path("path", path)?).map_err(refused)?;
            // Saved before it is carried out, so that it can be undone after a crash.
            saved.place = Some(Place::Planned(plan.clone()));
            let kept = service.run_dir.save(Saved::Fork, id.as_str(), &saved);
            kept.map_err(|error| internal("keep the fork in the run dir", &error))?;
            service.look_before_own_change(file.inode());
            let placed = plan.carry_out(file.mem_file.as_fd(), Prefer::Mount);
            service.note_own_change(file.inode());
            Some(placed.map_err(|error| {
                let _ = service.run_dir.forget(Saved::Fork, id.as_str());
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
        .map_or_else(|| file.path_for_forks(), Placement::path);
    Ok(Arc::new(Fork {
        id,
        template,
        reason,
        mem_backend: mem_backend(BackendType::File, path),
        backed_by: BackedBy::File(FileFork::new(Arc::clone(&file), placement, vmm)),
    }))
}

/// Finds VMMs whose pid was not given: processes that map the file by the path of one fork alone, also in a jail.
pub(super) fn find_vmms(service: &Arc<Service>, forks: &[Arc<Fork>]) {
    let waits = |file: &&FileFork| file.placement().is_some() && file.state() == ForkState::Waiting;
    let waiting = forks.iter().filter_map(|fork| Some((fork, fork.file().filter(waits)?)));
    let waiting: Vec<_> = waiting.collect();
    if waiting.is_empty() {
        return;
    }
    // One scan of all processes serves all waiting forks.
    let holders = match vmm_process::holders(&waiting.iter().map(|(_, file)| file.file.inode()).collect()) {
        Ok(holders) => holders,
        Err(error) => return warn!(%error, "cannot find the processes that map a template"),
    };
    for (fork, file) in waiting {
        let inode = file.file.inode();
        let is_it = |pid, paths: &[PathBuf]| {
            let place = file.placement().map(Placement::path);
            place.is_some_and(|place| paths.iter().any(|path| jailed::is_at(pid, path, place)))
        };
        let vmm = holders
            .found
            .iter()
            .filter(|holder| holder.file == inode && is_it(holder.pid, &holder.paths))
            .filter_map(|holder| VmmProcess::open(holder.pid).ok())
            // Checked again with the pid held, so that it cannot be another process.
            .find(|vmm| {
                let paths = vmm.mapped_paths(inode);
                paths.is_ok_and(|paths| is_it(vmm.pid(), &paths))
            });
        if let Some(vmm) = vmm.map(Arc::new)
            && file.found(&vmm)
        {
            service.save_fork(fork, Some(&vmm));
            watch(service, fork, &vmm);
            info!(event = "fork_serving", fork = %fork.id, pid = vmm.pid(), "VMM found");
        }
    }
}

/// Takes up a fork of an earlier daemon.
pub(super) fn find_again(service: &Arc<Service>, id: &str, saved: SavedFork) {
    let vmm = find_vmm(id, &saved);
    let gone = saved.vmm.is_some() && vmm.is_none();
    if gone || matches!(saved.place, Some(Place::Planned(_))) {
        forget_place(service, id, &saved);
        return info!(event = "fork_ended", fork = id, state = %ForkState::Exited, "ended");
    }
    let template = service.registry.template(&saved.template).ok();
    let with_file = template.and_then(|template| Some((template.file.clone()?, template)));
    let (Ok(id), Some((file, template))) = (id.parse(), with_file) else {
        forget_place(service, id, &saved);
        return warn!(
            event = "fork_lost",
            fork = id,
            template = saved.template,
            "fork lost: its template is"
        );
    };
    let pid = saved.vmm.map(|vmm| vmm.pid);
    let placement = match saved.place {
        Some(Place::Done(placement)) => Some(placement),
        _ => None,
    };
    let fork = Arc::new(Fork {
        id,
        template,
        reason: saved.reason,
        mem_backend: saved.mem_backend,
        backed_by: BackedBy::File(FileFork::new(file, placement, vmm)),
    });
    service.registry.restore_fork(Arc::clone(&fork));
    service.start(&fork);
    info!(event = "fork_found", fork = %fork.id, pid, "fork taken up");
}

/// Removes the placement of a fork that has ended, and its record.
fn forget_place(service: &Arc<Service>, id: &str, saved: &SavedFork) {
    let template = service.registry.template(&saved.template).ok();
    let inode = template.and_then(|template| Some(template.file.as_ref()?.inode()));
    if let Some(inode) = inode {
        service.look_before_own_change(inode);
    }
    let removed = saved.place.as_ref().map(Place::remove);
    if let Some(inode) = inode {
        service.note_own_change(inode);
    }
    service.forget_saved_as(id);
    if let Some(Err(error)) = removed {
        warn!(fork = id, error = chain(&error), "its memory file cannot be removed");
    }
}

/// Watches for the exit of a fork's VMM.
fn watch(service: &Arc<Service>, fork: &Arc<Fork>, vmm: &Arc<VmmProcess>) {
    let watching = Arc::downgrade(service);
    let watched = Arc::clone(fork);
    let on_exit = move || {
        if let Some(service) = watching.upgrade() {
            service.file_fork_ended(&watched, ForkState::Exited);
        }
    };
    if let Err(error) = service.exits.add(vmm, on_exit) {
        warn!(fork = %fork.id, %error, "its end will not be noticed");
    }
}

impl Lifecycle for FileFork {
    fn start(&self, service: &Arc<Service>, fork: &Arc<Fork>) {
        let vmm = self.vmm();
        service.save_fork(fork, vmm.as_deref());
        match vmm {
            Some(vmm) => watch(service, fork, &vmm),
            None => service.await_vmm(self),
        }
    }

    fn note_vmm(&self, _service: &Service, _fork: &Fork) {}

    fn complete(&self, fork: &Fork) -> Result<(), ApiError> {
        Err(refuse(
            ErrorCode::NotCompletable,
            format_args!("fork {} has the backend `file`: its VMM needs no daemon", fork.id),
        ))
    }

    fn kill(&self, service: &Arc<Service>, fork: &Arc<Fork>) -> Result<bool, ApiError> {
        let Some(vmm) = self.vmm() else { return Ok(true) };
        vmm.kill().map_err(|error| internal("kill the VMM", &error))?;
        let died = vmm.wait_exited(KILL_TIMEOUT);
        if died {
            service.file_fork_ended(fork, ForkState::Exited);
        }
        Ok(died)
    }

    fn close(&self, fork: &Fork) -> Result<(), ApiError> {
        if self.state() == ForkState::Serving {
            return Err(refuse(
                ErrorCode::ForkInUse,
                format_args!(
                    "the VMM of fork {} lives: end it first, or delete the fork with kill=true",
                    fork.id
                ),
            ));
        }
        Ok(())
    }

    fn release(&self, service: &Arc<Service>, fork: &Fork) {
        // If the fork has just ended, another thread may be removing it too.
        if let Err(error) = take_place_away(service, self) {
            warn_place_stays(fork, &error);
        }
    }
}

impl Service {
    /// Handles the end of a fork with `file`: its VMM has exited, or was never found.
    pub(in crate::service) fn file_fork_ended(self: &Arc<Self>, fork: &Arc<Fork>, state: ForkState) {
        if let Some(file) = fork.file()
            && file.end(state)
        {
            self.file_fork_is_over(fork, file);
        }
    }

    /// Cleans up after a fork with `file` that has just ended.
    pub(in crate::service) fn file_fork_is_over(self: &Arc<Self>, fork: &Arc<Fork>, file: &FileFork) {
        let removed = take_place_away(self, file);
        self.ended(fork);
        if let Err(error) = removed {
            warn_place_stays(fork, &error);
        }
    }
}

/// Removes the path of the memory file that was created for this fork, if any. Does nothing the second time.
fn take_place_away(service: &Arc<Service>, fork: &FileFork) -> Result<(), PlaceError> {
    service.look_before_own_change(fork.file.inode());
    let removed = fork.take_place_away();
    service.note_own_change(fork.file.inode());
    removed
}

fn warn_place_stays(fork: &Fork, error: &PlaceError) {
    warn!(fork = %fork.id, error = chain(error), "its memory file cannot be removed");
}

/// Appends to the reason for `file` how much was read into memory ahead of the fork.
fn with_warmth(reason: String, file: &LocalFile) -> String {
    match file.warmth.progress() {
        Some(progress) if progress.state == WarmthState::Warm => {
            let stays = if progress.resident { ", where it stays" } else { "" };
            let (read, huge) = (progress.read_bytes, progress.huge_bytes);
            format!(
                "{reason}; {read} bytes of it were brought into memory ahead{stays}, {huge} of them in pages of 2 MiB"
            )
        }
        _ => reason,
    }
}
