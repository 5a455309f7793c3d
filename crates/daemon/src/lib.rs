//! The long-lived service: control API, registry of templates and forks, metrics, configuration.
//!
//! | module | holds |
//! | --- | --- |
//! | `serve` | a daemon in a process of its own |
//! | `daemon` | start and stop |
//! | `config` | settings, from a file and from flags |
//! | `conversion` | the page server's types as those of the API |
//! | `api` | HTTP: calls, bodies, statuses, connections |
//! | `service` | the calls, without HTTP |
//! | `template`, `fork` | a template that was added, a fork that was created |
//! | `validity` | whether a template has changed |
//! | `learned` | zeros and working set of a template, saved beside its memory file |
//! | `local_file` | the memory file of a template |
//! | `backend` | the choice of a fork's backend, with its reason |
//! | `warmth` | templates in memory ahead of their forks |
//! | `placement`, `protection` | links, mounts and permissions of a memory file, set and undone |
//! | `ownership` | owner and mode of a memory file |
//! | `vmm_process`, `exit_watch`, `process_memory` | VMMs as processes: their identity, exit and memory use |
//! | `vmstate` | the page size of a guest, from the state file of its snapshot |
//! | `run_dir` | the folder with all state of a daemon |
//! | `own_thread` | tasks that block, and panics in tasks |
//! | `metrics`, `requests`, `logging` | metrics, counts of API calls, log lines |
//!
//! None of this is on the fault path, which is in the crate `pagecast`, on threads of its own.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

mod api;
mod backend;
pub mod config;
pub mod conversion;
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
