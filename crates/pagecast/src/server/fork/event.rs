//! The events for an observer of the server.

use std::sync::Arc;

use super::fail_reason::FailReason;
use super::id::ForkId;
use super::refusal::Refusal;
use super::status::ForkStatus;
use crate::template::{PrefaultTally, Recording};

/// An event in the life of a fork, for the observer of the server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ForkEvent {
    /// The VMM has connected, and its faults are answered from now on.
    Serving {
        /// The name of the fork.
        id: ForkId,
        /// The process id of the VMM.
        pid: i32,
        /// The size of its memory in bytes.
        memory_bytes: u64,
        /// The number of its regions.
        regions: usize,
    },
    /// The fork has ended, or its VMM was refused.
    Ended(ForkStatus),
    /// A connection was refused that had sent no file descriptor, or was of the wrong user: a probe, a health check,
    /// the VMM of another fork. No fork has ended. For each socket, only a few are reported in ten seconds.
    Refused {
        /// The fork that the socket is for, which waits on; `None` if it is for any number of forks.
        id: Option<ForkId>,
        /// The process that connected, if it is known.
        pid: Option<i32>,
        /// Why it was refused.
        refusal: Arc<Refusal>,
        /// The number of refused connections at this socket that were not reported since the last one.
        unreported: u64,
    },
    /// The window in which the first faults were recorded is over.
    Recorded {
        /// The name of the fork.
        id: ForkId,
        /// The pages that the fork touched.
        recording: Arc<Recording>,
    },
    /// The window in which the prefault was watched is over. The result is in the
    /// [score](crate::template::Template::prefault_score) of the template.
    Prefaulted {
        /// The name of the fork.
        id: ForkId,
        /// How well the faults were foreseen.
        tally: PrefaultTally,
    },
    /// The fork could not be completed, and is served as before.
    NotCompleted {
        /// The name of the fork.
        id: ForkId,
        /// Why.
        reason: Arc<FailReason>,
    },
}
