//! Calls that create, complete and delete forks.

use std::sync::Arc;

use pagecast::server::ForkId;
use pagecast_client::fork::{CreateFork, Prefault};
use pagecast_client::{ApiError, ErrorCode};
use tracing::info;

use super::Service;
use super::backends::{self, KILL_TIMEOUT, Order, socket_field};
use super::refusal::refuse;
use super::templates::{changed, check, check_page_size};
use crate::backend::{Facts, choose};
use crate::fork::Fork;
use crate::template::Template;

impl Service {
    /// Creates a fork.
    pub(crate) fn create_fork(self: &Arc<Self>, wanted: &CreateFork) -> Result<Arc<Fork>, ApiError> {
        self.check_open()?;
        if let Some(prefault @ (Prefault::WorkingSet | Prefault::All)) = wanted.prefault.filter(|_| wanted.record) {
            return Err(refuse(
                ErrorCode::InvalidField,
                format_args!(
                    "prefault: {prefault} installs pages that the recording would miss; leave it out, or use `none`"
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
        // Its VMM may have connected already.
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
            has_file: template.file.is_some(),
            remote: template.file.as_ref().and_then(|file| file.mem_file.remote()),
            needs_faults: match wanted.prefault {
                _ if wanted.record => Some("a recording"),
                Some(Prefault::All) => Some("a prefault of all pages"),
                _ => None,
            },
            of_socket: socket_field(wanted),
            of_file: wanted.path.is_some(),
        };
        let (backend, reason) = choose(asked, facts).map_err(|why| refuse(ErrorCode::BackendUnavailable, why))?;
        let order = Order {
            id,
            template,
            reason,
            wanted,
        };
        backends::make(self, backend, order)
    }

    /// Starts to track a fork that was created or taken up.
    pub(super) fn start(self: &Arc<Self>, fork: &Arc<Fork>) {
        backends::of(fork).start(self, fork);
    }

    /// Starts to complete a fork.
    pub(crate) fn complete_fork(&self, id: &str) -> Result<(), ApiError> {
        let fork = self.registry.fork(id)?;
        backends::of(&fork).complete(&fork)
    }

    /// Deletes a fork. With `kill`, kills its VMM first.
    pub(crate) fn remove_fork(self: &Arc<Self>, id: &str, kill: bool) -> Result<(), ApiError> {
        self.find_vmms();
        let fork = self.registry.fork(id)?;
        if kill {
            self.kill_vmm(&fork)?;
        }
        backends::of(&fork).close(&fork)?;
        // Another call may have deleted it and created another one with this id.
        let Some(was_noted) = self.registry.remove_fork(&fork) else {
            return Ok(());
        };
        self.forget(&fork);
        if fork.state().is_end() && !was_noted {
            Self::log_end(&fork);
        }
        info!(event = "fork_deleted", fork = id, "fork deleted");
        Ok(())
    }

    /// Kills the VMM of a fork and waits for its end.
    pub(super) fn kill_vmm(self: &Arc<Self>, fork: &Arc<Fork>) -> Result<(), ApiError> {
        if backends::of(fork).kill(self, fork)? {
            return Ok(());
        }
        Err(refuse(
            ErrorCode::ForkInUse,
            format_args!(
                "the VMM of fork {} was killed and has not died within {KILL_TIMEOUT:?}",
                fork.id
            ),
        ))
    }
}
