//! `cargo xtask results`: the numbers and pictures of the documentation, from one run of the benchmark.

use std::ffi::OsString;
use std::fs;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::cargo::{build_bench, workspace_root};

/// Where tables and pictures go.
const FOLDER: &str = "docs/bench";
/// Tables, in the folder.
const TABLES: &str = "results.md";
/// The heading of the table that the README shows too.
const GOALS: &str = "## goals\n\n";
/// What is around that table in the README.
const BEGIN: &str = "<!-- the goals of docs/bench/results.md: cargo xtask results -->\n\n";
const END: &str = "\n<!-- end -->";

/// Measure everything with `pagecast-bench`, and put tables and pictures where the documentation shows them
///
/// Writes docs/bench and the table of goals in README.md.
#[derive(Debug, clap::Args)]
pub(crate) struct Results {
    /// More that `pagecast-bench` takes, such as --quick
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Results {
    /// Measures and writes.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let root = workspace_root();
        let mut bench = Command::new(build_bench()?);
        bench.args(["--markdown", "--plots", FOLDER]).args(&self.arguments);
        bench.current_dir(root).stdin(Stdio::null()).stderr(Stdio::inherit());
        let measured = bench.output().context("failed to start pagecast-bench")?;
        ensure!(measured.status.success(), "pagecast-bench failed ({})", measured.status);
        let tables = String::from_utf8(measured.stdout).context("tables are text")?;
        let readme = root.join("README.md");
        let text = fs::read_to_string(&readme).context("failed to read README.md")?;
        fs::write(&readme, with_goals(&text, goals(&tables)?)?).context("failed to write README.md")?;
        fs::write(root.join(FOLDER).join(TABLES), &tables).context("failed to write the tables")?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The table of goals.
fn goals(tables: &str) -> Result<&str> {
    let (_, rest) = tables.split_once(GOALS).context("there is no table of goals")?;
    let end = rest.find("\n\n").map_or(rest.len(), |end| end + 1);
    Ok(&rest[..end])
}

/// The README with another table.
fn with_goals(readme: &str, goals: &str) -> Result<String> {
    let (before, rest) = readme
        .split_once(BEGIN)
        .context("README.md does not say where the goals begin")?;
    let (_, after) = rest
        .split_once(END)
        .context("README.md does not say where the goals end")?;
    Ok(format!("{before}{BEGIN}{goals}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_goals_goes_into_the_readme_and_nothing_else_changes() {
        let tables =
            "# bench\n\n## faults\n\n| a |\n\n## goals\n\n| goal |\n| --- |\n| fast |\n\nNumbers are medians\n";
        let readme = format!("before\n\n{BEGIN}| old |{END}\n\nafter\n");
        let written = with_goals(&readme, goals(tables).unwrap()).unwrap();
        assert_eq!(
            written,
            format!("before\n\n{BEGIN}| goal |\n| --- |\n| fast |\n{END}\n\nafter\n")
        );
        assert_eq!(with_goals(&written, goals(tables).unwrap()).unwrap(), written);
    }

    #[test]
    fn the_readme_has_a_place_for_them() {
        let readme = fs::read_to_string(workspace_root().join("README.md")).unwrap();
        with_goals(&readme, "| goal |\n").unwrap();
    }
}
