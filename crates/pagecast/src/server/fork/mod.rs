//! A fork as callers name it, configure it and see it: values, without threads and locks.

mod event;
mod fail_reason;
mod id;
mod latency;
mod options;
mod refusal;
mod status;

pub use event::ForkEvent;
pub use fail_reason::FailReason;
pub use id::{ForkId, InvalidForkId};
pub use latency::{Latency, LatencyHistogram};
#[cfg(target_os = "linux")]
pub(super) use options::Plan;
pub use options::{ForkOptions, Prefault};
pub use refusal::Refusal;
pub use status::{FaultCounts, ForkState, ForkStats, ForkStatus, PrefaultCounts};
