//! What an observer of the server is told.

use std::sync::Arc;

use super::fail_reason::FailReason;
use super::fork_id::ForkId;
use super::fork_status::ForkStatus;
use super::refusal::Refusal;
use crate::template::{PrefaultTally, Recording};

/// A turn in the life of a fork, for whoever observes the server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ForkEvent {
    /// Its VMM has connected and its faults are answered from now on.
    Serving {
        /// Which fork.
        id: ForkId,
        /// Its VMM.
        pid: i32,
        /// The size of its memory in bytes.
        memory_bytes: u64,
        /// How many regions that is.
        regions: usize,
    },
    /// It has ended; also where its VMM was refused and it never began.
    Ended(ForkStatus),
    /// A connection was refused that had sent no file descriptor, or was of the wrong user: a probe, a health check, the
    /// VMM of another fork. No fork has ended. Reported a few times in ten seconds for each socket at most.
    Refused {
        /// The fork that the socket is for, which waits on; `None` if it is for any number of forks.
        id: Option<ForkId>,
        /// The process that connected, if it is known.
        pid: Option<i32>,
        /// Why it was refused.
        refusal: Arc<Refusal>,
        /// How many others were refused at this socket since the last that was reported.
        unreported: u64,
    },
    /// The window in which its first faults were recorded is over.
    Recorded {
        /// Which fork.
        id: ForkId,
        /// What it touched.
        recording: Arc<Recording>,
    },
    /// The window in which its prefault was watched is over. The [score](crate::template::Template::prefault_score) of its
    /// template knows.
    Prefaulted {
        /// Which fork.
        id: ForkId,
        /// How well its faults were foreseen.
        tally: PrefaultTally,
    },
    /// It could not be completed, and is served as before.
    NotCompleted {
        /// Which fork.
        id: ForkId,
        /// Why.
        reason: Arc<FailReason>,
    },
}
