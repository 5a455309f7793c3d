//! One paused microVM, many live copies: pagecast serves the page faults of Firecracker forks from one template.
//!
//! | module | holds | does I/O |
//! | --- | --- | --- |
//! | [`handshake`] | what a VMM says about its memory: framing, parsing, validation | no |
//! | [`session`] | the state machine of one fork: events in, steps out | no |
//! | [`template`] | where pages come from | files |
//! | [`server`] | sockets, workers, the life of forks | Linux |

#![cfg_attr(
    not(target_os = "linux"),
    expect(dead_code, reason = "pure parts that only the server uses, which needs Linux")
)]

pub mod handshake;
mod page;
pub mod server;
pub mod session;
pub mod template;

pub use page::{PageIndex, PageSize};
pub use server::Server;
pub use template::Template;
