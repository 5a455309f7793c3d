//! All forks of a server, and the observer of their events.

mod counters;
mod fork_record;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::Error;
use super::fork::{FailReason, ForkEvent, ForkId, ForkOptions, ForkState};
use crate::template::Template;
pub(super) use counters::Counters;
pub(super) use fork_record::{Asker, ForkRecord, Holder, Requested};

/// Called with every event of every fork, on the thread where it happens: it must not block.
pub(super) type Observer = Box<dyn Fn(ForkEvent) + Send + Sync>;

/// The forks by name.
pub(super) struct Registry {
    forks: Mutex<BTreeMap<ForkId, Arc<ForkRecord>>>,
    /// The serial number of the next fork.
    serials: AtomicU64,
    failures: Mutex<BTreeMap<&'static str, u64>>,
    observer: Observer,
    /// The acceptor, which has new forks.
    acceptor: Holder,
    /// Held between finding memory for a completion and requesting it, so that no two get the same memory.
    pub(super) admission: Mutex<()>,
}

impl Registry {
    pub(super) fn new(observer: Observer, acceptor: Holder) -> Self {
        Self {
            forks: Mutex::default(),
            serials: AtomicU64::new(1),
            failures: Mutex::default(),
            observer,
            acceptor,
            admission: Mutex::new(()),
        }
    }

    fn forks(&self) -> MutexGuard<'_, BTreeMap<ForkId, Arc<ForkRecord>>> {
        // No code that can panic runs under this lock.
        self.forks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inserts a new fork. Check and insert are one step, so no two forks can have one name.
    pub(super) fn insert(
        &self,
        id: ForkId,
        template: &Template,
        options: &ForkOptions,
        anonymous: bool,
    ) -> Result<Arc<ForkRecord>, Error> {
        match self.forks().entry(id.clone()) {
            Entry::Occupied(_) => Err(Error::ForkExists(id)),
            Entry::Vacant(vacant) => {
                let serial = self.serials.fetch_add(1, Ordering::Relaxed);
                let record = ForkRecord::new(id, serial, template, options, anonymous, self.acceptor.clone());
                Ok(Arc::clone(vacant.insert(Arc::new(record))))
            }
        }
    }

    pub(super) fn get(&self, id: &ForkId) -> Option<Arc<ForkRecord>> {
        self.forks().get(id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<ForkRecord>> {
        self.forks().values().cloned().collect()
    }

    /// The forks that are served.
    pub(super) fn serving(&self) -> Vec<Arc<ForkRecord>> {
        let mut forks = self.all();
        forks.retain(|record| record.state() == ForkState::Serving);
        forks
    }

    /// Removes this fork, but not another that has its name by now.
    pub(super) fn remove(&self, record: &Arc<ForkRecord>) {
        let mut forks = self.forks();
        if forks.get(&record.id).is_some_and(|held| Arc::ptr_eq(held, record)) {
            forks.remove(&record.id);
        }
    }

    pub(super) fn observe(&self, event: ForkEvent) {
        (self.observer)(event);
    }

    /// Ends a fork and reports that, once.
    pub(super) fn end(&self, record: &Arc<ForkRecord>, state: ForkState, reason: Option<Arc<FailReason>>) {
        let code = reason.as_ref().map(|reason| reason.code());
        // Locked before the failure is visible: a thread that sees the failure finds it counted.
        let mut failures = self.lock_failures();
        if !record.end(state, reason) {
            return;
        }
        if let Some(code) = code {
            *failures.entry(code).or_default() += 1;
        }
        drop(failures);
        if record.anonymous {
            self.remove(record);
        }
        self.observe(ForkEvent::Ended(record.status()));
    }

    /// The number of forks that failed, by the code of the reason.
    pub(super) fn failures(&self) -> BTreeMap<&'static str, u64> {
        self.lock_failures().clone()
    }

    fn lock_failures(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        // No code that can panic runs under this lock.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
