//! The control API of pagecast, as types, and a client.
//!
//! | module | holds |
//! | --- | --- |
//! | [`template`] | templates: requests and answers |
//! | [`fork`] | forks: requests and answers |
//! | [`health`] | the daemon itself |
//! | [`error`] | errors of the API, with stable codes |
//! | [`client`] | the client |
//! | [`http`] | HTTP over a unix socket, for Firecracker's API too |
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
