//! The options of workers.

use std::num::NonZeroU64;
use std::time::Duration;

/// The options of all workers.
#[derive(Clone, Copy, Debug)]
pub(in crate::server) struct WorkerOptions {
    /// How long a fault may wait for the template or for memory.
    pub(in crate::server) fault_deadline: Duration,
    /// The most pages that one fault installs.
    pub(in crate::server) fault_around: usize,
    /// Bytes a second.
    pub(in crate::server) completion_rate: Option<NonZeroU64>,
    /// How long to check for further faults without sleeping, after a fault.
    pub(in crate::server) busy_poll: Duration,
    /// Whether this process may raise the priority of a thread.
    pub(in crate::server) may_be_raised: bool,
}
