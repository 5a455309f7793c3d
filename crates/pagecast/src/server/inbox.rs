//! Messages to a thread that waits in epoll.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::EventfdFlags;

/// A queue with an eventfd that is readable while a message is in it. Senders never wait.
pub(super) struct Inbox<T> {
    queue: Mutex<Vec<T>>,
    eventfd: OwnedFd,
}

impl<T> Inbox<T> {
    pub(super) fn new() -> std::io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            queue: Mutex::new(Vec::new()),
            eventfd,
        })
    }

    pub(super) fn send(&self, message: T) {
        // No code that can panic runs under this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        // Fails only if the counter is full, and then the eventfd is readable already.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    /// Takes all messages. The eventfd is then not readable any more.
    pub(super) fn take(&self) -> Vec<T> {
        // The eventfd comes first: a message that is sent in between makes it readable again.
        let _ = rustix::io::read(&self.eventfd, &mut [0; 8]);
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl<T> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}
