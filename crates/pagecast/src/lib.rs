//! pagecast serves the page faults of Firecracker forks, many live copies of one paused microVM, from one template.
//!
//! | module | holds | does I/O |
//! | --- | --- | --- |
//! | [`handshake`] | the VMM's message about its memory: framing, parsing, validation | no |
//! | `session` | the state machine of one fork: events in, steps out | no |
//! | [`template`] | sources of pages | files |
//! | [`server`] | sockets, workers, the life of forks | Linux |
//! | `cgroup` | memory and hugepages left in cgroups | Linux |
//! | `memory` | memory left on the host | Linux |
//!
//! # Example
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use pagecast::server::{ForkOptions, ForkState};
//! use pagecast::{Server, Template};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let template = Template::open("snapshot.mem".as_ref())?;
//! let server = Server::builder().start()?;
//! let fork = server.register("fork-1".parse()?, &template, &ForkOptions::new("/run/fork-1.sock"))?;
//!
//! // Give `fork.socket_path()` to Firecracker as the `backend_path` of a `mem_backend` of type `Uffd` …
//! let status = fork.wait(Duration::from_secs(10), |state| state != ForkState::Waiting);
//! println!("{}: {}", status.id, status.state);
//!
//! // Completes every fork, so that their VMMs run on without a server.
//! server.close(Duration::from_mins(1))?;
//! # Ok(())
//! # }
//! ```

#![cfg_attr(
    not(target_os = "linux"),
    expect(dead_code, reason = "pure parts that only the server uses, which needs Linux")
)]

#[cfg(target_os = "linux")]
pub mod cgroup;
pub mod handshake;
#[cfg(target_os = "linux")]
pub mod memory;
mod page;
mod page_set;
#[cfg(target_os = "linux")]
mod priority;
#[cfg(target_os = "linux")]
#[doc(hidden)]
pub mod proc_files;
pub mod server;
mod session;
pub mod template;

pub use page::{PageIndex, PageSize};
pub use server::Server;
pub use template::Template;
