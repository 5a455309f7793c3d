//! The decision which completions begin: those that there is memory for.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::memory;
use crate::server::error::{Error, NotEnoughMemory};
use crate::server::fork::ForkState;
use crate::server::registry::{Asker, ForkRecord, Registry};
use crate::template::Template;

/// How long completing one fork searches for zeros if memory is short without them.
pub(in crate::server) const ZEROS_PATIENCE: Duration = Duration::from_millis(500);

impl Registry {
    /// Requests the completion of one fork. If memory is short with the known zeros of the templates, searches for more
    /// first, for a bounded time.
    pub(in crate::server) fn complete(&self, record: &Arc<ForkRecord>) -> Result<(), Error> {
        let mut forks = Vec::new();
        let state = self.complete_if_fitting(record, &mut forks).or_else(|_| {
            memory::find_zeros(&forks, Instant::now() + ZEROS_PATIENCE);
            self.complete_if_fitting(record, &mut forks)
        })?;
        record.may_be_completed(state)
    }

    /// Requests the completion of a fork if it is served, and if there is memory for it and all others under way. Sets
    /// `forks` to all of them. Returns the state of the fork, which shows whether the completion was requested.
    fn complete_if_fitting(
        &self,
        record: &Arc<ForkRecord>,
        forks: &mut Vec<Arc<ForkRecord>>,
    ) -> Result<ForkState, NotEnoughMemory> {
        // The lock guards no data, so a panic under it leaves nothing behind.
        let _admission = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        *forks = self.serving();
        forks.retain(|fork| Arc::ptr_eq(fork, record) || fork.completion_is_requested());
        if record.state() == ForkState::Serving && !record.completion_is_requested() {
            memory::check_room(forks)?;
        }
        Ok(record.request_completion(Asker::Request))
    }

    /// Requests the completion of as many forks of a template as memory and time allow, for a caller that takes the
    /// template away. Returns `true` if those are all forks of it that are served.
    pub(in crate::server) fn complete_fitting(&self, template: &Template, until: Instant) -> bool {
        let _admission = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let (completing, mut wanted): (Vec<_>, Vec<_>) = self
            .serving()
            .into_iter()
            .partition(|fork| fork.completion_is_requested());
        wanted.retain(|fork| fork.template.is_same(template));
        let fitting = memory::fitting(&completing, &wanted, until);
        let asked_before = completing.iter().filter(|fork| fork.template.is_same(template));
        for fork in asked_before.chain(&fitting) {
            fork.request_completion(Asker::Vacator);
        }
        fitting.len() == wanted.len()
    }
}
