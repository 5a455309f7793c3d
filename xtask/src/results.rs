//! `cargo xtask results`: the numbers and pictures of the documentation, from one run of the benchmark.

use std::ffi::OsString;
use std::fs;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::cargo::{build_bench, workspace_root};

/// Folder of tables and pictures.
const FOLDER: &str = "docs/bench";
/// File of the tables in the folder.
const TABLES: &str = "results.md";

/// Measure everything with `pagecast-bench`, and write tables and pictures to the documentation
///
/// Writes docs/bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Results {
    /// Further arguments of `pagecast-bench`, such as --quick
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Results {
    /// Measures, and writes the results.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let root = workspace_root();
        let mut bench = Command::new(build_bench()?);
        bench.args(["--markdown", "--plots", FOLDER]).args(&self.arguments);
        bench.current_dir(root).stdin(Stdio::null()).stderr(Stdio::inherit());
        let measured = bench.output().context("failed to start pagecast-bench")?;
        ensure!(measured.status.success(), "pagecast-bench failed ({})", measured.status);
        let tables = String::from_utf8(measured.stdout).context("tables are text")?;
        fs::write(root.join(FOLDER).join(TABLES), &tables).context("failed to write the tables")?;
        Ok(ExitCode::SUCCESS)
    }
}
