//! Forks with `uffd`, which the page server serves.

use std::sync::Arc;

use pagecast::server::{ForkOptions, ForkState as ServedState, Prefault as ServedPrefault};
use pagecast_client::fork::{BackendType, CreateFork, Prefault};
use pagecast_client::{ApiError, Backend, ErrorCode, ForkState};
use tracing::{error, warn};

use super::{KILL_TIMEOUT, Lifecycle, Order, find_vmm};
use crate::fork::{BackedBy, Fork, SavedFork, UffdFork, mem_backend};
use crate::service::Service;
use crate::service::refusal::{internal, refuse, server_refuses};
use crate::vmm_process::VmmProcess;

/// Returns the first field of a request that concerns a socket, if there is one.
pub(in crate::service) fn socket_field(wanted: &CreateFork) -> Option<&'static str> {
    [
        ("socket_path", wanted.socket_path.is_some()),
        ("uid", wanted.uid.is_some()),
        ("gid", wanted.gid.is_some()),
    ]
    .into_iter()
    .find_map(|(field, given)| given.then_some(field))
}

/// Refuses fields that only `file` has.
fn check_fields(order: &Order<'_>) -> Result<(), String> {
    let reason = &order.reason;
    match (&order.wanted.path, socket_field(order.wanted)) {
        (None, _) => Ok(()),
        (Some(_), Some(field)) => Err(format!(
            "path needs `file`, and {field} needs `uffd`; leave one of them out"
        )),
        (Some(_), None) => Err(format!(
            "path: a fork with `uffd` gets a socket, not a file; use socket_path. It has `uffd` because {reason}"
        )),
    }
}

pub(super) fn make(service: &Arc<Service>, order: Order<'_>) -> Result<Arc<Fork>, ApiError> {
    check_fields(&order).map_err(|why| refuse(ErrorCode::InvalidField, why))?;
    let Order {
        id,
        template,
        reason,
        wanted,
    } = order;
    let socket_path = match &wanted.socket_path {
        Some(path) => service.allowed_path("socket_path", path)?,
        None => service.run_dir.fork_socket(id.as_str()),
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
    let served = service
        .server
        .register(id.clone(), &template.pages, &options)
        .map_err(|error| server_refuses(&error))?;
    Ok(Arc::new(Fork {
        id,
        template,
        reason,
        mem_backend: mem_backend(BackendType::Uffd, &socket_path),
        backed_by: BackedBy::Uffd(UffdFork::new(served, prefault, wanted.record)),
    }))
}

/// Notes VMMs that have connected, even if the event for that has not arrived yet.
pub(super) fn find_vmms(service: &Service, forks: &[Arc<Fork>]) {
    for fork in forks {
        if let Some(uffd) = fork.uffd().filter(|uffd| uffd.vmm.get().is_none())
            && fork.state() == ForkState::Serving
        {
            uffd.note_vmm(service, fork);
        }
    }
}

/// Kills the VMM of a fork with `uffd` whose daemon has died: its userfaultfd is closed, so its next fault would hang
/// forever. Spares a VMM that is complete, which the daemon had no time to record.
pub(in crate::service) fn end_orphan(service: &Service, id: &str, saved: &SavedFork) {
    if let Some(vmm) = find_vmm(id, saved).filter(|vmm| vmm.needs_server()) {
        let killed = vmm.kill().is_ok() && vmm.wait_exited(KILL_TIMEOUT);
        if killed && let Ok(template) = saved.template.parse() {
            service.registry.count_kill(&template, Backend::Uffd, "server_died");
        }
        service.forget_saved_as(id);
        return error!(
            event = "fork_lost",
            fork = id,
            pid = vmm.pid(),
            killed,
            "the daemon that served this VMM has died, and the VMM would hang forever"
        );
    }
    service.forget_saved_as(id);
}

impl Lifecycle for UffdFork {
    fn start(&self, service: &Arc<Service>, fork: &Arc<Fork>) {
        // Its VMM may have connected already.
        self.note_vmm(service, fork);
        if fork.state().is_end() {
            service.ended(fork);
        }
    }

    fn note_vmm(&self, service: &Service, fork: &Fork) {
        let Some(pid) = self.served.status().pid else { return };
        // Nothing to note if the VMM has died already.
        if let Ok(vmm) = VmmProcess::open(pid).map(Arc::new)
            && self.vmm.set(Arc::clone(&vmm)).is_ok()
        {
            service.save_fork(fork, Some(&vmm));
        }
    }

    fn complete(&self, _fork: &Fork) -> Result<(), ApiError> {
        self.served.complete().map_err(|error| server_refuses(&error))
    }

    fn kill(&self, _service: &Arc<Service>, fork: &Arc<Fork>) -> Result<bool, ApiError> {
        if fork.state() != ForkState::Complete {
            self.served.kill();
            return Ok(self.served.wait(KILL_TIMEOUT, ServedState::is_end).state.is_end());
        }
        // The page server no longer serves it.
        let Some(vmm) = self.vmm.get() else { return Ok(true) };
        vmm.kill().map_err(|error| internal("kill the VMM", &error))?;
        Ok(vmm.wait_exited(KILL_TIMEOUT))
    }

    fn close(&self, _fork: &Fork) -> Result<(), ApiError> {
        // This also closes a fork that waits for its VMM.
        self.served.forget().map_err(|error| server_refuses(&error))
    }

    fn release(&self, _service: &Arc<Service>, fork: &Fork) {
        if let Err(error) = self.served.forget() {
            warn!(fork = %fork.id, %error, "cannot be forgotten");
        }
    }
}
