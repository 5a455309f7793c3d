//! Buffers that the forks of one worker share in turn.

use std::time::Instant;

use pagecast_uffd::EventBuffer;

use crate::page::PageSize;

/// Buffers, and the last reading of the clock.
pub(in crate::server) struct Scratch {
    pub(super) events: EventBuffer,
    /// As long as the largest page.
    pub(super) bytes: Vec<u8>,
    /// The last reading of the clock. On the fault path this stands for the current time, if nothing slow came between.
    pub(super) read_clock_at: Instant,
}

impl Scratch {
    pub(in crate::server) fn new() -> Self {
        Self {
            events: EventBuffer::new(),
            bytes: vec![0; PageSize::Huge.as_usize()],
            read_clock_at: Instant::now(),
        }
    }
}

/// The first `length` bytes of `bytes`, which grows if it is too short. It is as long as the largest page, so it never
/// grows on the fault path.
pub(super) fn room(bytes: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if bytes.len() < length {
        bytes.resize(length, 0);
    }
    bytes.get_mut(..length).unwrap_or_default()
}
