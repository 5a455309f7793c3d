//! The `pagecast` command.
#![forbid(unsafe_code)]

mod handle;
mod report;

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
    Handle(handle::Handle),
}

/// The exit code for anything that went wrong and has no code of its own.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Handle(handle) => handle.run(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("pagecast: {error:#}");
        ExitCode::from(FAILED)
    })
}
