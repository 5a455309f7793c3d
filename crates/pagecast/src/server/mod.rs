//! The page server: sockets, workers, and the life of forks.
//!
//! Linux only. On other platforms the same types exist and [`Builder::start`] returns [`Error::Unsupported`], so that a
//! caller can restore with the `File` backend instead.
//!
//! | thread | does |
//! | --- | --- |
//! | acceptor | listens, accepts, carries out handshakes, enforces deadlines |
//! | workers | answer faults; a fork belongs to one of them for life |
//! | fill pool | helps workers to fill forks, when cores are free |
//! | readers | read bytes that are not in memory; each template has one for its whole life, and a few more while needed |

mod deadlines;
mod error;
mod fail_reason;
mod fork_event;
mod fork_id;
mod fork_options;
mod fork_status;
mod latency;
mod refusal;

#[cfg(target_os = "linux")]
mod acceptor;
#[cfg(target_os = "linux")]
mod admission;
#[cfg(target_os = "linux")]
mod counters;
#[cfg(target_os = "linux")]
mod disposal;
#[cfg(target_os = "linux")]
mod fill_pool;
#[cfg(target_os = "linux")]
mod fork_record;
#[cfg(target_os = "linux")]
mod handshaking;
#[cfg(target_os = "linux")]
mod hugepages;
#[cfg(target_os = "linux")]
mod idle_timer;
#[cfg(target_os = "linux")]
mod inbox;
#[cfg(target_os = "linux")]
mod listener;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod page_server;
#[cfg(target_os = "linux")]
mod registry;
#[cfg(target_os = "linux")]
mod served_fork;
#[cfg(target_os = "linux")]
mod socket_file;
#[cfg(target_os = "linux")]
mod transparent_hugepages;
#[cfg(not(target_os = "linux"))]
mod unsupported;
#[cfg(target_os = "linux")]
mod worker;
#[cfg(target_os = "linux")]
mod workers;

pub use crate::session::Violation;
pub use deadlines::Deadlines;
pub use error::{CloseError, Error, NotEnoughMemory, chain};
pub use fail_reason::FailReason;
pub use fork_event::ForkEvent;
pub use fork_id::{ForkId, InvalidForkId};
pub use fork_options::{ForkOptions, Prefault};
pub use fork_status::{FaultCounts, ForkState, ForkStats, ForkStatus, PrefaultCounts};
pub use latency::{Latency, LatencyHistogram};
#[cfg(target_os = "linux")]
pub use page_server::{Builder, Fork, Server};
pub use refusal::Refusal;
#[cfg(not(target_os = "linux"))]
pub use unsupported::{Builder, Fork, Server};
