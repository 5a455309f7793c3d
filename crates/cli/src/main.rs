//! The `pagecast` command.
#![forbid(unsafe_code)]

mod argument;
mod completions;
mod daemon;
mod doctor;
mod facts;
mod firecracker;
mod fork;
mod handle;
mod man;
mod output;
mod report;
mod run;
mod status;
mod template;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fork paused Firecracker microVMs: serve the memory of many from one template.
#[derive(Parser)]
#[command(name = "pagecast", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Handle(handle::Handle),
    Doctor(doctor::Doctor),
    Completions(completions::Completions),
    Man(man::Man),
    Template(template::TemplateArgs),
    Fork(fork::ForkArgs),
    Status(status::Status),
    Run(run::Run),
    #[command(name = run::EXEC, hide = true)]
    Exec(run::Exec),
}

/// The exit code for anything that went wrong and has no code of its own.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Handle(handle) => handle.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
        Command::Template(template) => template.run(),
        Command::Fork(fork) => fork.run(),
        Command::Status(status) => status.run(),
        Command::Run(run) => run.run(),
        Command::Exec(exec) => exec.run(),
    };
    result.unwrap_or_else(|error| {
        // That nobody reads stderr is no reason to panic, as `eprintln` would.
        let _ = writeln!(std::io::stderr(), "pagecast: {error:#}");
        ExitCode::from(daemon::exit_code(&error).unwrap_or(FAILED))
    })
}
