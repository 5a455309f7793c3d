//! Conversions of the page server's types to those of the API.
//!
//! The API and `pagecast handle --json` both use them, so each fact has one name.

use pagecast::server::{self, FailReason, FaultCounts, ForkStatus, PrefaultCounts, Refusal, chain};
use pagecast_client::ForkState;
use pagecast_client::fork::{Faults, ForkError, ForkPrefault, Latency, Prefault};

/// Converts the state of a fork.
pub fn state(state: server::ForkState) -> ForkState {
    match state {
        server::ForkState::Waiting => ForkState::Waiting,
        server::ForkState::Serving => ForkState::Serving,
        server::ForkState::Complete => ForkState::Complete,
        server::ForkState::Exited => ForkState::Exited,
        server::ForkState::Failed => ForkState::Failed,
    }
}

/// Converts the reason of a failure. The message includes all its causes.
pub fn fail_reason(reason: &FailReason) -> ForkError {
    ForkError {
        code: reason.code().to_owned(),
        message: chain(reason),
    }
}

/// Converts the reason of a refusal. The message includes all its causes.
pub fn refusal(refusal: &Refusal) -> ForkError {
    ForkError {
        code: refusal.code().to_owned(),
        message: chain(refusal),
    }
}

/// Returns the size of a fork's memory in bytes; `None` before the handshake.
pub fn memory_bytes(status: &ForkStatus) -> Option<u64> {
    (status.memory_bytes > 0).then_some(status.memory_bytes)
}

/// Converts counts of faults.
pub fn faults(counts: FaultCounts) -> Faults {
    Faults {
        demand: counts.demand,
        zero: counts.zero,
        removed: counts.removed,
        prefaulted: counts.prefaulted,
        retried: counts.retried,
        slow: counts.slow,
        around: counts.around,
    }
}

/// Converts a summary of latencies.
pub fn latency(latency: server::Latency) -> Latency {
    Latency {
        p50: latency.p50,
        p99: latency.p99,
        max: latency.max,
    }
}

/// Converts counts of the first faults of a fork with the setting `what`.
pub fn prefault(what: Prefault, counts: PrefaultCounts) -> ForkPrefault {
    ForkPrefault {
        what,
        late: counts.late,
        missed: counts.missed,
        held_out_used: counts.held_out_used,
    }
}
