//! The one door to every task of this project: `cargo xtask TASK`.
#![forbid(unsafe_code)]

mod cargo;
mod lint;
mod test;

use std::process::ExitCode;

use clap::Parser;

/// The tasks of this project
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    Lint,
    Test(test::Test),
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Lint => lint::run(),
        Task::Test(test) => test.run(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
