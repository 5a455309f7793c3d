//! The long-lived service: control API, registry of templates and forks, metrics, configuration.
//!
//! | module | holds |
//! | --- | --- |
//! | `serve` | a daemon in a process of its own |
//! | `daemon` | start and stop |
//! | `config` | what can be set |
//! | `api` | HTTP: calls, bodies, statuses, connections |
//! | `service` | what the calls do |
//! | `template`, `fork` | what there is |
//! | `validity` | whether a template is still what it was |
//! | `learned` | what is learned of a template, and kept beside its memory file |
//! | `backend` | which backend a fork gets, and why |
//! | `warmth` | templates in memory ahead of their forks |
//! | `placement`, `protection` | what is done to a memory file, and undone |
//! | `ownership` | owner and mode of a memory file |
//! | `vmm_process`, `exit_watch`, `process_memory` | VMMs as processes, their end, and what they cost |
//! | `vmstate` | what the state file of a snapshot says of its pages |
//! | `run_dir` | what is kept |
//! | `own_thread` | tasks that block |
//! | `metrics`, `requests`, `logging` | what is told |
//!
//! Nothing of this is on the fault path: that is in the library, on threads of its own.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod api;
mod backend;
pub mod config;
mod daemon;
pub mod error;
mod exit_watch;
mod fork;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod inode;
mod jailed;
mod learned;
mod local_file;
pub mod logging;
#[cfg(test)]
mod mapper;
mod metrics;
mod own_thread;
mod ownership;
mod placement;
mod process_memory;
mod protection;
mod requests;
pub mod run_dir;
mod serve;
mod service;
mod template;
mod validity;
mod vmm_process;
#[doc(hidden)]
pub mod vmstate;
mod warmth;

pub use api::openapi;
pub use config::{Config, Settings};
pub use daemon::Daemon;
pub use error::StartError;
pub use serve::{Ended, serve};
