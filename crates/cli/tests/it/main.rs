//! The `pagecast` command as people use it.
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]

mod command;
mod completions;
mod daemon;
mod doctor;
mod examples;
mod firecracker;
mod fork;
mod handle;
mod host;
mod jailed;
mod run;
mod serve;
mod serve_firecracker;
mod serve_log;
mod served;
mod signals;
mod status;
mod template;
mod terminal;
mod train;
mod unread;
