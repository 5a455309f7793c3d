//! The page server: sockets, workers, and the life of forks.
//!
//! Linux only. Elsewhere the same types exist and [`Builder::start`] answers [`Error::Unsupported`], so that a caller can
//! restore with the `File` backend instead.
//!
//! | thread | does |
//! | --- | --- |
//! | acceptor | listens, accepts, shakes hands, keeps deadlines |
//! | workers | answer faults; a fork belongs to one of them for life |
//! | crew | helps workers to fill forks, when cores are free |
//! | readers | read what is not in memory; each template has one for as long as it lives, and a few more while needed |

mod error;
mod failure;
mod fork;
mod latency;

#[cfg(target_os = "linux")]
mod acceptor;
#[cfg(target_os = "linux")]
mod crew;
#[cfg(target_os = "linux")]
mod disposal;
#[cfg(target_os = "linux")]
mod filler;
#[cfg(target_os = "linux")]
mod handle;
#[cfg(target_os = "linux")]
mod handshaking;
#[cfg(target_os = "linux")]
mod hugepages;
#[cfg(target_os = "linux")]
mod inbox;
#[cfg(target_os = "linux")]
mod listener;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod quiet;
#[cfg(target_os = "linux")]
mod record;
#[cfg(target_os = "linux")]
mod registry;
#[cfg(target_os = "linux")]
mod run;
#[cfg(not(target_os = "linux"))]
#[path = "unsupported.rs"]
mod run;
#[cfg(target_os = "linux")]
mod served_fork;
#[cfg(target_os = "linux")]
mod socket_file;
#[cfg(target_os = "linux")]
mod transparent;
#[cfg(target_os = "linux")]
mod worker;
#[cfg(target_os = "linux")]
mod workers;

pub use crate::session::Violation;
pub use error::{CloseError, Error, NotEnoughMemory};
pub use failure::{FailReason, Refusal, chain};
pub use fork::{
    Deadlines, FaultCounts, ForkEvent, ForkId, ForkOptions, ForkState, ForkStats, ForkStatus, InvalidForkId, Prefault,
    PrefaultCounts,
};
pub use latency::{Latency, LatencyHistogram};
pub use run::{Builder, Fork, Server};
