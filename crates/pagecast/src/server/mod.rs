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
//!
//! Its modules, each of which uses only modules further down:
//!
//! | module | holds |
//! | --- | --- |
//! | `page_server` | the handles of the embedding program: the server, its builder, a fork |
//! | `acceptor` | the sockets that VMMs connect to, and their handshakes |
//! | `workers`, `worker` | the threads that answer faults, and the forks that they serve |
//! | `admission` | decisions by the memory left: which VMMs are served, which completions begin |
//! | `registry` | all forks by name: their records, counters and requests |
//! | `fill` | installs of pages that no thread waits for |
//! | `hugepages`, `disposal`, `socket_file`, `inbox`, `read_buffer` | the parts of the threads above |
//! | `fork`, `error`, `deadlines`, `causes` | values of the interface, on every platform |

mod causes;
mod deadlines;
mod error;
mod fork;

#[cfg(target_os = "linux")]
mod acceptor;
#[cfg(target_os = "linux")]
mod admission;
#[cfg(target_os = "linux")]
mod disposal;
#[cfg(target_os = "linux")]
mod fill;
#[cfg(target_os = "linux")]
mod hugepages;
#[cfg(target_os = "linux")]
mod inbox;
#[cfg(target_os = "linux")]
mod page_server;
#[cfg(target_os = "linux")]
mod read_buffer;
#[cfg(target_os = "linux")]
mod registry;
#[cfg(target_os = "linux")]
mod socket_file;
#[cfg(not(target_os = "linux"))]
mod unsupported;
#[cfg(target_os = "linux")]
mod worker;
#[cfg(target_os = "linux")]
mod workers;

pub use crate::session::Violation;
pub use causes::chain;
pub use deadlines::Deadlines;
pub use error::{CloseError, Error, NotEnoughMemory};
pub use fork::{
    FailReason, FaultCounts, ForkEvent, ForkId, ForkOptions, ForkState, ForkStats, ForkStatus, InvalidForkId, Latency,
    LatencyHistogram, Prefault, PrefaultCounts, Refusal,
};
#[cfg(target_os = "linux")]
pub use page_server::{Builder, Fork, Server};
#[cfg(not(target_os = "linux"))]
pub use unsupported::{Builder, Fork, Server};
