//! Counts of answered API calls.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The labels by which answered requests are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Answered {
    pub(crate) method: &'static str,
    /// The path, with variable names in place of values. `other` if the path does not exist, or this client may not use
    /// it.
    pub(crate) path: String,
    pub(crate) status: u16,
}

/// Counters of the requests that were answered.
#[derive(Default)]
pub(crate) struct Requests(Mutex<BTreeMap<Answered, u64>>);

impl Requests {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Answered, u64>> {
        // No code that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request.
    pub(crate) fn count(&self, answered: Answered) {
        *self.lock().entry(answered).or_default() += 1;
    }

    /// Returns the number of answered requests by label.
    pub(crate) fn counts(&self) -> BTreeMap<Answered, u64> {
        self.lock().clone()
    }
}
