//! `cargo xtask coverage`: the part of the lines that tests run.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};

use crate::cargo::workspace_root;
use crate::cargo_tool::{CargoTool, status};
use crate::test::prepare_firecracker;

const LLVM_COV: CargoTool = CargoTool {
    name: "llvm-cov",
    version: "0.6.21",
};

/// The least part of the lines, in percent.
const FLOOR: &str = "coverage-floor";

/// Files that are no product: tests, what they are tested with, benches and tasks.
const LEFT_OUT: &str = r"crates/(testkit|fuzz|bench)/|xtask/|/tests/|/tests\.rs";

/// Run all tests and check that they run at least the part of the lines that the file coverage-floor says, in percent
///
/// cargo-llvm-cov is installed if it is missing. It needs the component llvm-tools of rustup.
#[derive(Debug, clap::Args)]
pub(crate) struct Coverage {
    /// Given to the test runner
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

impl Coverage {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let floor = fs::read_to_string(workspace_root().join(FLOOR))
            .with_context(|| format!("failed to read {FLOOR}"))?
            .trim()
            .parse::<u8>()
            .with_context(|| format!("{FLOOR} holds no number of percent"))?;
        prepare_firecracker()?;
        let mut coverage = LLVM_COV.command()?;
        coverage
            .args(["nextest", "--workspace", "--locked", "--summary-only"])
            .args(["--ignore-filename-regex", LEFT_OUT])
            .args(["--fail-under-lines", &floor.to_string()])
            .args(&self.args);
        ensure!(
            status(&mut coverage)?.success(),
            "a test failed, or tests run less than {floor} % of the lines"
        );
        Ok(ExitCode::SUCCESS)
    }
}
