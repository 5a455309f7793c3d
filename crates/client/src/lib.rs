//! The control API of pagecast: what is said, as types, and a client that says it.
//!
//! | module | holds |
//! | --- | --- |
//! | [`template`] | templates, as they are added and as they are described |
//! | [`fork`] | forks, as they are asked for and as they are described |
//! | [`health`] | the daemon itself |
//! | [`error`] | what goes wrong, with codes that do not change |
//! | [`client`] | the client |
//! | [`http`] | HTTP over a unix socket, which Firecracker's API speaks too |
//!
//! # Example
//!
//! ```no_run
//! use pagecast_client::{Client, CreateFork};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let pagecast = Client::new("/run/pagecast/control.sock");
//! let fork = pagecast.create_fork(&CreateFork::of("browser")).await?;
//! println!("{}", serde_json::to_string(&fork.mem_backend)?); // for Firecracker's PUT /snapshot/load
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod error;
pub mod fork;
pub mod health;
pub mod template;

#[cfg(unix)]
pub mod client;
#[cfg(unix)]
pub mod http;

#[cfg(unix)]
pub use client::{Client, ClientError};
pub use error::{ApiError, ErrorCode};
pub use fork::{Backend, CreateFork, CreatedFork, Fork, ForkState, Prefault};
pub use health::Health;
pub use template::{AddTemplate, Template};
