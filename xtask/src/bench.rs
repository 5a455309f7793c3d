//! `cargo xtask bench`: `pagecast-bench`, in a release build.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::cargo::build_bench;

/// Build pagecast in release mode and run `pagecast-bench` with these arguments (see `pagecast-bench --help`)
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Bench {
    /// Arguments of `pagecast-bench`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Bench {
    /// Returns the exit code of `pagecast-bench`.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let mut bench = Command::new(build_bench()?);
        let status = bench.args(&self.arguments).status();
        let code = status.context("failed to start pagecast-bench")?.code();
        let code = code.and_then(|code| u8::try_from(code).ok());
        Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
    }
}
