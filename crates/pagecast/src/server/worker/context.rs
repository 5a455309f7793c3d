//! The state that a worker shares with its forks and its filler.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;

use super::message::Message;
use crate::page::PageSize;
use crate::server::fill::FillPool;
use crate::server::inbox::Inbox;
use crate::server::registry::Registry;

/// The part of a worker that never changes.
pub(super) struct WorkerContext {
    pub(super) inbox: Arc<Inbox<Message>>,
    pub(super) registry: Arc<Registry>,
    pub(super) fill_pool: Arc<FillPool>,
    /// The epoll that the worker waits on.
    pub(super) epoll: OwnedFd,
    /// A huge page of zeros, for memory that `UFFDIO_ZEROPAGE` does not work on. Never written, so it takes no memory.
    pub(super) zeros: Vec<u8>,
    /// How long a fault may wait for the template or for memory.
    pub(super) fault_deadline: Duration,
    /// The most pages that one fault installs.
    pub(super) fault_around: usize,
    /// The most bytes a second that a completion installs while no caller waits for it.
    pub(super) completion_rate: Option<NonZeroU64>,
}

impl WorkerContext {
    pub(super) fn new(
        registry: Arc<Registry>,
        fill_pool: Arc<FillPool>,
        fault_deadline: Duration,
        fault_around: usize,
        completion_rate: Option<NonZeroU64>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            inbox: Arc::new(Inbox::new()?),
            registry,
            fill_pool,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            zeros: vec![0; PageSize::Huge.as_usize()],
            fault_deadline,
            fault_around,
            completion_rate,
        })
    }

    /// Returns `true` if an event waits for the worker.
    pub(super) fn has_event(&self) -> bool {
        let mut ready = [PollFd::new(&self.epoll, PollFlags::IN)];
        rustix::event::poll(&mut ready, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}
