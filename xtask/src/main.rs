//! All tasks of this project: `cargo xtask TASK`.
#![forbid(unsafe_code)]

mod bench;
mod cargo;
mod cargo_tool;
mod coverage;
mod demo;
mod deny;
mod fuzz;
mod lint;
mod openapi;
mod results;
mod test;

use std::process::ExitCode;

use clap::Parser;
use pagecast_bench::sim_vmm;

/// The tasks of this project
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    Bench(bench::Bench),
    Coverage(coverage::Coverage),
    Demo(demo::Demo),
    Deny(deny::Deny),
    Fuzz(fuzz::Fuzz),
    Lint(lint::Lint),
    #[command(name = "openapi")]
    OpenApi(openapi::OpenApi),
    Results(results::Results),
    Test(test::Test),
}

fn main() -> ExitCode {
    if sim_vmm::asked_for() {
        return exit_code(sim_vmm::run().map(|()| ExitCode::SUCCESS));
    }
    exit_code(match Task::parse() {
        Task::Bench(bench) => bench.run(),
        Task::Coverage(coverage) => coverage.run(),
        Task::Demo(demo) => demo.run(),
        Task::Deny(deny) => deny.run(),
        Task::Fuzz(fuzz) => fuzz.run(),
        Task::Lint(lint) => lint.run(),
        Task::OpenApi(openapi) => openapi.run(),
        Task::Results(results) => results.run(),
        Task::Test(test) => test.run(),
    })
}

fn exit_code(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
