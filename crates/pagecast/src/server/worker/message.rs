//! Messages to a worker.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use pagecast_uffd::{Peer, Uffd};

use crate::server::fill::Filled;
use crate::server::registry::ForkRecord;
use crate::session::Session;
use crate::template::ReadResult;

/// The place of a fork in its worker. Another fork may get the index later, but never the serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) index: usize,
    pub(super) serial: u64,
}

/// A fork whose VMM has shaken hands, on its way to a worker.
pub(in crate::server) struct NewFork {
    pub(in crate::server) record: Arc<ForkRecord>,
    pub(in crate::server) uffd: Uffd,
    pub(in crate::server) peer: Peer,
    pub(in crate::server) socket: OwnedFd,
    pub(in crate::server) session: Session,
}

/// Identifies a read of a fork of a worker. Places are used again, numbers are not.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadToken {
    pub(super) slot: Slot,
    /// The place of the read in the fork, and its number.
    pub(super) place: usize,
    pub(super) number: u64,
}

/// A message to a worker.
pub(super) enum Message {
    /// Serve this fork from now on.
    Adopt(Box<NewFork>),
    /// The template's bytes, read on another thread.
    Bytes { token: ReadToken, bytes: ReadResult },
    /// The kernel fills the zeros of this fork in pages of 4 KiB.
    KernelFillsSmall(Slot),
    /// A step of filling this fork, carried out on another thread, is over.
    Filled { slot: Slot, filled: Filled },
    /// The request for this fork has changed.
    Requested(Slot),
    /// Stop as soon as there is no fork left.
    Stop,
}
