//! A worker, as other threads see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::message::{Message, NewFork};
use crate::server::inbox::Inbox;

/// A worker, as other threads see it. Dropping this stops it: it cannot get forks any more.
pub(in crate::server) struct WorkerHandle {
    inbox: Arc<Inbox<Message>>,
    forks: Arc<AtomicUsize>,
}

impl WorkerHandle {
    pub(super) fn new(inbox: Arc<Inbox<Message>>, forks: Arc<AtomicUsize>) -> Self {
        Self { inbox, forks }
    }

    /// The number of its forks.
    pub(in crate::server) fn forks(&self) -> usize {
        self.forks.load(Ordering::Relaxed)
    }

    /// Gives it a fork, for life.
    pub(in crate::server) fn adopt(&self, fork: NewFork) {
        self.forks.fetch_add(1, Ordering::Relaxed);
        self.inbox.send(Message::Adopt(Box::new(fork)));
    }

    /// Makes it stop once it has no fork.
    pub(in crate::server) fn stop(&self) {
        self.inbox.send(Message::Stop);
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.stop();
    }
}
