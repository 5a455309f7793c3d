//! `cargo xtask test`: all tests, and everything that they need.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context as _, Result, ensure};
use pagecast_bench::progress::Progress;
use pagecast_testkit::firecracker::{self, Kvm, kvm};

use crate::cargo::{cargo, metadata};
use crate::cargo_tool::{CargoTool, status};

pub(crate) const NEXTEST: CargoTool = CargoTool {
    name: "nextest",
    version: "0.9.143",
};

/// Run all tests with cargo-nextest, which is installed if it is missing
///
/// First gets everything that the tests need: the simulated VMM, the tiny guest and its Rust target, Firecracker. At
/// the end, lists the skipped tests, with the reasons.
#[derive(Debug, clap::Args)]
pub(crate) struct Test {
    /// Arguments of the test runner, such as the names of some tests; doc tests are left out then
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

impl Test {
    /// Returns the exit code of the test runner.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let skipped = SkippedTests::none_yet()?;
        // Tests look for `sim-vmm`, `pagecast` and the examples beside themselves.
        let build = status(cargo("build").args(["--locked", "--workspace", "--bins", "--examples"]))?;
        ensure!(build.success(), "the workspace does not build");
        prepare_firecracker()?;

        // Doc tests run first, so that the summary of the runner comes last.
        let doc_tests = if self.args.is_empty() {
            exit_code(status(cargo("test").args(["--locked", "--workspace", "--doc"]))?)
        } else {
            ExitCode::SUCCESS
        };
        let tests = exit_code(status(self.runner()?.env(SkippedTests::VARIABLE, &skipped.path))?);
        eprint!("{}", skipped.report()?);
        Ok(if tests == ExitCode::SUCCESS { doc_tests } else { tests })
    }

    /// Returns cargo-nextest, which gives each test a process of its own. Many tests count what their process holds,
    /// limit it, or measure its CPU time, so `cargo test` does not work.
    fn runner(&self) -> Result<Command> {
        let mut runner = NEXTEST.command()?;
        runner.args(["run", "--locked", "--workspace"]);
        // Tests wait for processes and timers: two more at a time than there are processors keep these busy.
        if !self.args.iter().any(|arg| arg.starts_with("--test-threads")) {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            runner.arg(format!("--test-threads={}", processors + 2));
        }
        runner.args(&self.args);
        Ok(runner)
    }
}

/// Downloads and builds what the tests on real Firecracker need, so that it does not happen in a test's time.
pub(crate) fn prepare_firecracker() -> Result<()> {
    if let Kvm::Missing(why) = kvm()? {
        eprintln!("tests on real Firecracker are skipped: {why}");
        return Ok(());
    }
    visibly("getting the tiny guest", firecracker::build_guest)?;
    visibly("getting Firecracker", firecracker::binary)?;
    visibly("getting the jailer", firecracker::jailer)
}

/// Prints the name of a step, and then its result.
fn visibly(what: &'static str, get: fn() -> Result<PathBuf>) -> Result<()> {
    let progress = Progress::start(what);
    let path = get()?;
    progress.done(&path.display().to_string());
    Ok(())
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    // `None` if a signal ended it.
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

/// The file in which tests note that they were skipped: runners hide the output of tests that pass.
struct SkippedTests {
    path: PathBuf,
}

impl SkippedTests {
    /// See `pagecast_testkit::skip`.
    const VARIABLE: &str = "PAGECAST_SKIPPED";

    fn none_yet() -> Result<Self> {
        let path: PathBuf = metadata()?.target_directory.join("skipped-tests").into();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("failed to remove {}", path.display()))
            }
            _ => Ok(Self { path }),
        }
    }

    fn report(&self) -> Result<String> {
        Ok(report_of_skipped(&read_if_there(&self.path)?))
    }
}

fn read_if_there(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        text => text.with_context(|| format!("failed to read {}", path.display())),
    }
}

/// `notes` are lines of "test: reason".
fn report_of_skipped(notes: &str) -> String {
    let notes: BTreeSet<&str> = notes.lines().collect();
    if notes.is_empty() {
        return "nothing was skipped\n".to_owned();
    }
    let mut report = format!("skipped on this machine: {}\n", notes.len());
    for note in notes {
        report.push_str("  ");
        report.push_str(note);
        report.push('\n');
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_skipped_is_said() {
        assert_eq!(report_of_skipped(""), "nothing was skipped\n");
    }

    #[test]
    fn each_skipped_test_is_told_once_with_its_reason() {
        assert_eq!(
            report_of_skipped("b: no /dev/kvm\na: no hugepages\nb: no /dev/kvm\n"),
            "skipped on this machine: 2\n  a: no hugepages\n  b: no /dev/kvm\n"
        );
    }
}
