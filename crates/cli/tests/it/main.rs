//! The `pagecast` command as people use it.
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]

mod command;
mod examples;
mod firecracker;
mod handle;
