//! Messages to a thread that waits in epoll.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::EventfdFlags;

/// A queue with an eventfd that is readable while something is in it. Senders never wait.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    queue: Mutex<Vec<T>>,
    bell: OwnedFd,
}

impl<T> Inbox<T> {
    pub(super) fn new() -> std::io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            queue: Mutex::new(Vec::new()),
            bell,
        })
    }

    pub(super) fn send(&self, message: T) {
        // No code that can panic runs under this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        // Fails only where the counter is full, and then the bell rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Takes everything out and silences the bell.
    pub(super) fn take(&self) -> Vec<T> {
        // First the bell: what is sent in between rings it again.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
