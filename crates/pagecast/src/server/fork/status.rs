//! The status of a fork: its state and its counters.

use std::fmt;
use std::sync::Arc;

use super::fail_reason::FailReason;
use super::id::ForkId;
use super::latency::Latency;

/// The state of a fork. The last three are ends: the server then holds only its counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ForkState {
    /// The VMM has not connected, or its handshake is not complete.
    Waiting,
    /// The faults of the fork are answered.
    Serving,
    /// All memory is installed and unregistered: the fork no longer needs the server.
    Complete,
    /// The VMM has exited.
    Exited,
    /// The fork could not be served. Its VMM was refused, or killed before it could hang or read wrong bytes.
    Failed,
}

impl ForkState {
    /// Returns `true` if the state is final.
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

/// The status of a fork.
#[derive(Clone, Debug)]
pub struct ForkStatus {
    /// Its name.
    pub id: ForkId,
    /// The state of the fork.
    pub state: ForkState,
    /// The process id of its VMM, once connected.
    pub pid: Option<i32>,
    /// The size of its memory in bytes; 0 before the handshake.
    pub memory_bytes: u64,
    /// Why it failed, or cannot be completed.
    pub reason: Option<Arc<FailReason>>,
    /// Counters of its pages.
    pub stats: ForkStats,
}

/// Counters of the pages of a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForkStats {
    /// Counts of pages.
    pub faults: FaultCounts,
    /// From reading a fault until its page is installed.
    pub fault_latency_us: Latency,
    /// Bytes of the template copied into the fork.
    pub installed_bytes: u64,
    /// Bytes of zeros that were given back to the kernel, which fills them in by itself.
    pub given_back_bytes: u64,
    /// How well the prefault foresaw the first faults.
    pub prefault: PrefaultCounts,
}

/// How well a prefault of the working set foresaw the first faults of a fork. Counts of faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefaultCounts {
    /// Faults of pages that were to be installed ahead, before their turn came.
    pub late: u64,
    /// Faults of pages that are not in the working set.
    pub missed: u64,
    /// Faults of pages that were held out, to see whether the fork would touch them.
    pub held_out_used: u64,
}

/// Counts of faults and pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Page faults that were answered.
    pub demand: u64,
    /// The number of these that were answered with zeros.
    pub zero: u64,
    /// Pages the guest gave back.
    pub removed: u64,
    /// Pages installed that no thread waited for.
    pub prefaulted: u64,
    /// Installs that the kernel asked to retry.
    pub retried: u64,
    /// Faults that waited for the template to be read from disk.
    pub slow: u64,
    /// Pages that were installed together with one that faulted.
    pub around: u64,
}
