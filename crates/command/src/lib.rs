//! Shared parts of pagecast's commands: output and signals.
//!
//! | module | holds |
//! | --- | --- |
//! | [`output`] | standard output: tables for people, JSON for programs |
//! | [`progress`] | bars and spinners on standard error |
//! | [`stderr`] | lines on standard error that never hold up the thread that writes them |
//! | [`signals`] | the signals that ask a process to end |
#![forbid(unsafe_code)]

pub mod output;
pub mod progress;
#[cfg(target_os = "linux")]
pub mod signals;
#[cfg(unix)]
pub mod stderr;

pub use output::{Column, Output, harmless};
