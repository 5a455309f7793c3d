//! The daemon on a real socket, asked as its users ask it.
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]
#![cfg(target_os = "linux")]

mod answers;
mod bad_input;
mod clients;
mod codes;
mod contract;
mod fixture;
mod guard;
mod http;
mod jails;
mod kept;
mod learned;
mod life;
mod logs;
mod openapi;
mod page_size;
mod protect;
mod strange_names;
mod warm;
