//! The `pagecast` command.
#![forbid(unsafe_code)]

mod argument;
mod completions;
mod daemon;
mod doctor;
mod facts;
mod fd_limit;
mod firecracker;
mod fork;
mod handle;
mod man;
mod report;
mod run;
mod serve;
mod status;
mod template;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pagecast_command::stderr;

/// Fork paused Firecracker microVMs: serve the memory of many from one template.
#[derive(Parser)]
#[command(name = "pagecast", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Serve),
    Handle(handle::Handle),
    Doctor(doctor::Doctor),
    Completions(completions::Completions),
    Man(man::Man),
    Template(template::TemplateArgs),
    Fork(fork::ForkArgs),
    Status(status::Status),
    Run(run::Run),
}

/// The exit code of errors that have no other.
const FAILED: u8 = 1;

/// The exit code of a server whose VMMs were killed at a second signal.
const KILLED: u8 = 3;

fn main() -> ExitCode {
    if let Some(exec) = run::Exec::asked_for() {
        return exit_code(exec.run());
    }
    let code = exit_code(match Cli::parse().command {
        Command::Serve(serve) => serve.run(),
        Command::Handle(handle) => handle.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
        Command::Template(template) => template.run(),
        Command::Fork(fork) => fork.run(),
        Command::Status(status) => status.run(),
        Command::Run(run) => run.run(),
    });
    stderr::finish();
    code
}

/// Writes the error to stderr, if there is one, and returns the exit code.
fn exit_code(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        stderr::write_line(format!("pagecast: {error:#}\n").as_bytes());
        ExitCode::from(daemon::exit_code(&error).unwrap_or(FAILED))
    })
}
