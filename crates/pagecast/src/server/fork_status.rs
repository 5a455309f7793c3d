//! What is known of a fork: its state and its numbers.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::fail_reason::FailReason;
use super::fork_id::ForkId;
use super::latency::Latency;

/// Where a fork is in its life. The last three are ends: nothing of it is held any more but its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ForkState {
    /// Its VMM has not connected, or not finished its handshake.
    Waiting,
    /// Its faults are answered.
    Serving,
    /// Everything is installed and unregistered: it no longer needs the server.
    Complete,
    /// Its VMM has exited.
    Exited,
    /// It could not be served: its VMM was refused, or killed rather than left to hang or to go wrong.
    Failed,
}

impl ForkState {
    /// Whether nothing will change any more.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Complete | Self::Exited | Self::Failed)
    }
}

impl fmt::Display for ForkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting",
            Self::Serving => "serving",
            Self::Complete => "complete",
            Self::Exited => "exited",
            Self::Failed => "failed",
        })
    }
}

/// What is known of a fork.
#[derive(Clone, Debug, Serialize)]
pub struct ForkStatus {
    /// Its name.
    pub id: ForkId,
    /// Where it is in its life.
    pub state: ForkState,
    /// The process id of its VMM, once connected.
    pub pid: Option<i32>,
    /// The size of its memory in bytes; 0 before the handshake.
    pub memory_bytes: u64,
    /// Why it failed, or cannot be completed.
    #[serde(rename = "error")]
    pub reason: Option<Arc<FailReason>>,
    /// What happened to its pages.
    #[serde(flatten)]
    pub stats: ForkStats,
}

/// What happened to the pages of a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ForkStats {
    /// Counts of pages.
    pub faults: FaultCounts,
    /// From reading a fault to its page being in place.
    pub fault_latency_us: Latency,
    /// Bytes of the template copied into the fork.
    pub installed_bytes: u64,
    /// Bytes of zeros that were given back to the kernel, which fills them in by itself.
    pub given_back_bytes: u64,
    /// How well its prefault has foreseen its first faults.
    pub prefault: PrefaultCounts,
}

/// How well a prefault of the working set has foreseen the first faults of a fork. Counts of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefaultCounts {
    /// Of pages that were to be installed ahead, and whose turn had not come.
    pub late: u64,
    /// Of pages that are not in the working set.
    pub missed: u64,
    /// Of pages that were held out, to see whether they would be asked for.
    pub held_out_used: u64,
}

/// Counts of faults and pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultCounts {
    /// Page faults that were answered.
    pub demand: u64,
    /// Those of them that were answered with zeros.
    pub zero: u64,
    /// Pages the guest gave back.
    pub removed: u64,
    /// Pages installed that nobody waited for.
    pub prefaulted: u64,
    /// Installs that the kernel asked to retry.
    pub retried: u64,
    /// Faults that waited for the template to be read from disk.
    pub slow: u64,
}
