//! The `pagecast` command.
#![forbid(unsafe_code)]

mod fd_limit;
mod handle;
mod report;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fork paused Firecracker microVMs: serve the memory of many from one template.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Serve),
    Handle(handle::Handle),
}

/// The exit code for anything that went wrong and has no code of its own.
const FAILED: u8 = 1;

/// The exit code of a server whose VMMs were killed at the second signal.
const KILLED: u8 = 3;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(serve) => serve.run(),
        Command::Handle(handle) => handle.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("pagecast: {error:#}");
        ExitCode::from(FAILED)
    })
}
