//! Buffers that the forks of one worker share in turn.

use std::time::Instant;

use pagecast_uffd::EventBuffer;

use crate::page::PageSize;
use crate::server::read_buffer::ReadBuffer;

/// Buffers, and the last reading of the clock.
pub(in crate::server::worker) struct Scratch {
    pub(super) events: EventBuffer,
    /// As long as the largest page, so that it never grows on the fault path.
    pub(super) bytes: ReadBuffer,
    /// The last reading of the clock. On the fault path this stands for the current time, if nothing slow came between.
    pub(in crate::server::worker) read_clock_at: Instant,
}

impl Scratch {
    pub(in crate::server::worker) fn new() -> Self {
        Self {
            events: EventBuffer::new(),
            bytes: ReadBuffer::with_len(PageSize::Huge.as_usize()),
            read_clock_at: Instant::now(),
        }
    }
}
