//! Messages to a worker.

use crate::server::fill::Filled;
use crate::server::served_fork::{NewFork, ReadToken};
use crate::template::ReadResult;

/// The place of a fork in its worker. Another fork may get the index later, but never the serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct Slot {
    pub(in crate::server) index: usize,
    pub(in crate::server) serial: u64,
}

/// A message to a worker.
pub(in crate::server) enum Message {
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
