//! `cargo xtask coverage`: the lines that tests reach, and the floor of each crate.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, ensure};
use comfy_table::Cell;
use pagecast_command::{Column, Output};
use serde::Deserialize;

use crate::cargo::workspace_root;
use crate::cargo_tool::{CargoTool, status};
use crate::test::{NEXTEST, prepare_firecracker};

const LLVM_COV: CargoTool = CargoTool {
    name: "llvm-cov",
    version: "0.9.1",
};
/// The file with the floors.
const FLOORS: &str = "coverage-floor.toml";

/// Run all tests and measure the covered lines with cargo-llvm-cov, which is installed if it is missing
///
/// Prints the lines of each crate, without those of tests. Fails if a crate is below its floor in coverage-floor.toml.
/// A test that fails does not fail this task: `cargo xtask test` runs the same tests without instrumentation.
#[derive(Debug, clap::Args)]
pub(crate) struct Coverage {
    /// Do not run the tests, and report on the last run
    #[arg(long)]
    no_run: bool,
}

impl Coverage {
    /// Fails if a crate is below its floor.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let floors = fs::read_to_string(workspace_root().join(FLOORS));
        let floors = floors.with_context(|| format!("failed to read {FLOORS}"))?;
        let floors: Floors = toml::from_str(&floors).with_context(|| format!("failed to parse {FLOORS}"))?;
        if !self.no_run {
            run_tests()?;
        }
        let covered = by_crate(&report()?, workspace_root());
        Output::stdout().print(&table(&covered, &floors.lines))?;
        let problems = problems(&covered, &floors.lines);
        ensure!(problems.is_empty(), "{}", problems.join("\n"));
        Ok(ExitCode::SUCCESS)
    }
}

/// cargo-llvm-cov. Adds the component of the Rust toolchain that it needs, if that is missing.
fn llvm_cov() -> Result<Command> {
    let mut command = LLVM_COV.command()?;
    command.env("CARGO_LLVM_COV_SETUP", "yes");
    Ok(command)
}

fn run_tests() -> Result<()> {
    prepare_firecracker()?;
    let mut tests = llvm_cov()?;
    NEXTEST.provide_to(&mut tests)?;
    tests.args(["nextest", "--locked", "--workspace", "--no-report", "--no-cfg-coverage"]);
    // A test starts many processes. By default, each of them would leave a file of some MiB behind.
    tests.env("LLVM_PROFILE_FILE_NAME", "pagecast-%4m.profraw");
    clean()?;
    if !status(&mut tests)?.success() {
        eprintln!("some tests failed under instrumentation: `cargo xtask test` shows whether they fail without it");
    }
    Ok(())
}

/// Removes the counts of the last run, and its programs: old ones would be counted as well.
fn clean() -> Result<()> {
    let cleaned = status(llvm_cov()?.args(["clean", "--workspace"]))?;
    ensure!(cleaned.success(), "failed to remove the files of the last run");
    Ok(())
}

/// Returns the coverage of each file.
fn report() -> Result<Report> {
    let mut report = llvm_cov()?;
    report.args(["report", "--json", "--summary-only"]);
    let output = report
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start cargo-llvm-cov")?;
    ensure!(output.status.success(), "cargo-llvm-cov failed ({})", output.status);
    serde_json::from_slice(&output.stdout).context("failed to parse the report of cargo-llvm-cov")
}

/// The report of `llvm-cov export`.
#[derive(Debug, Deserialize)]
struct Report {
    data: Vec<ReportData>,
}

#[derive(Debug, Deserialize)]
struct ReportData {
    files: Vec<ReportFile>,
}

#[derive(Debug, Deserialize)]
struct ReportFile {
    filename: String,
    summary: Summary,
}

#[derive(Debug, Deserialize)]
struct Summary {
    lines: Lines,
}

/// Counts of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
struct Lines {
    count: u64,
    covered: u64,
}

impl Lines {
    /// Returns the percentage of covered lines, rounded down.
    fn percent(self) -> u64 {
        (self.covered * 100).checked_div(self.count).unwrap_or(100)
    }
}

/// The content of the file with the floors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Floors {
    /// The least percentage of covered lines of each crate, by its folder.
    lines: BTreeMap<String, u64>,
}

/// Returns the sums of the lines of each crate, by its folder. Files of tests are left out.
fn by_crate(report: &Report, root: &Path) -> BTreeMap<String, Lines> {
    let mut crates: BTreeMap<String, Lines> = BTreeMap::new();
    for file in report.data.iter().flat_map(|data| &data.files) {
        let Ok(path) = Path::new(&file.filename).strip_prefix(root) else {
            continue;
        };
        let Some((folder, source)) = path.to_str().and_then(|path| path.split_once("/src/")) else {
            continue;
        };
        if source.split('/').any(|part| part == "tests" || part == "tests.rs") {
            continue;
        }
        let folder = folder.strip_prefix("crates/").unwrap_or(folder);
        let lines = crates.entry(folder.to_owned()).or_default();
        lines.count += file.summary.lines.count;
        lines.covered += file.summary.lines.covered;
    }
    crates
}

fn table(covered: &BTreeMap<String, Lines>, floors: &BTreeMap<String, u64>) -> String {
    let columns = [
        Column::Text("crate"),
        Column::Number("lines"),
        Column::Number("covered"),
        Column::Number("percent"),
        Column::Number("floor"),
    ];
    let rows = covered.iter().map(|(name, lines)| {
        let floor = floors.get(name).map(u64::to_string).unwrap_or_default();
        vec![
            Cell::new(name),
            Cell::new(lines.count),
            Cell::new(lines.covered),
            Cell::new(lines.percent()),
            Cell::new(floor),
        ]
    });
    Output::stdout().table(&columns, rows.collect())
}

/// Returns the crates that are below their floors, have none, or were not measured, one a line.
fn problems(covered: &BTreeMap<String, Lines>, floors: &BTreeMap<String, u64>) -> Vec<String> {
    let below = covered.iter().filter_map(|(name, lines)| match floors.get(name) {
        Some(floor) if lines.percent() >= *floor => None,
        Some(floor) => Some(format!(
            "{name}: {}% of lines are covered, at least {floor}% must be",
            lines.percent()
        )),
        None => Some(format!("{name}: {FLOORS} has no floor for it")),
    });
    let missing = floors.keys().filter(|name| !covered.contains_key(*name));
    below
        .chain(missing.map(|name| format!("{name}: {FLOORS} has a floor for it, and no line of it was measured")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floors(floors: &[(&str, u64)]) -> BTreeMap<String, u64> {
        floors
            .iter()
            .map(|(name, floor)| ((*name).to_owned(), *floor))
            .collect()
    }

    #[test]
    fn lines_are_summed_by_crate_without_those_of_tests() {
        let report = r#"{"data": [{"files": [
            {"filename": "/p/crates/uffd/src/a.rs", "summary": {"lines": {"count": 10, "covered": 9, "percent": 90.0}}},
            {"filename": "/p/crates/uffd/src/b/c.rs", "summary": {"lines": {"count": 30, "covered": 20}}},
            {"filename": "/p/crates/uffd/src/b/tests.rs", "summary": {"lines": {"count": 5, "covered": 5}}},
            {"filename": "/p/crates/uffd/build.rs", "summary": {"lines": {"count": 5, "covered": 5}}},
            {"filename": "/p/xtask/src/main.rs", "summary": {"lines": {"count": 3, "covered": 0}}},
            {"filename": "/elsewhere/src/lib.rs", "summary": {"lines": {"count": 7, "covered": 7}}}
        ]}]}"#;
        let covered = by_crate(&serde_json::from_str(report).unwrap(), Path::new("/p"));
        let expected = [("uffd", 40, 29), ("xtask", 3, 0)];
        let expected = expected.map(|(name, count, covered)| (name.to_owned(), Lines { count, covered }));
        assert_eq!(covered, BTreeMap::from(expected));
        assert_eq!(covered["uffd"].percent(), 72);
    }

    #[test]
    fn a_crate_must_have_a_floor_and_reach_it() {
        let lines = Lines {
            count: 100,
            covered: 80,
        };
        let covered = BTreeMap::from([("uffd".to_owned(), lines)]);
        assert!(problems(&covered, &floors(&[("uffd", 80)])).is_empty());
        let below = problems(&covered, &floors(&[("uffd", 81)]));
        assert_eq!(below, ["uffd: 80% of lines are covered, at least 81% must be"]);
        assert_eq!(problems(&covered, &floors(&[])).len(), 1);
        assert_eq!(problems(&covered, &floors(&[("uffd", 1), ("gone", 1)])).len(), 1);
    }

    #[test]
    fn the_committed_floors_can_be_read() {
        let floors = fs::read_to_string(workspace_root().join(FLOORS)).unwrap();
        let floors: Floors = toml::from_str(&floors).unwrap();
        assert!(floors.lines.values().all(|floor| *floor <= 100), "{floors:?}");
    }
}
