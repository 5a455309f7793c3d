//! The `pagecast` command as people use it.
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]

mod command;
mod firecracker;
mod handle;
mod serve;
mod serve_firecracker;
mod served;
