//! `cargo xtask lint`: all static checks.

mod arrows;
mod circles;
mod files;
mod links;
mod skips;
mod target;
mod tool;
mod unsafe_code;

use std::io::Write as _;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use console::style;
use pagecast_command::progress::Progress;
use pagecast_testkit::firecracker::{build_guest, guest_command};

use crate::cargo::{cargo, cargo_path, metadata};
use crate::openapi;

/// Platforms for which the library must compile, besides this one.
const OTHER_PLATFORMS: [&str; 3] = [
    "aarch64-apple-darwin",
    "x86_64-pc-windows-gnu",
    "aarch64-unknown-linux-gnu",
];

/// A check. An error says what is wrong.
struct Check {
    name: String,
    run: Box<dyn Fn() -> Result<()>>,
}

impl Check {
    fn new(name: impl Into<String>, run: impl Fn() -> Result<()> + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

/// Run all static checks
///
/// All checks run, even if some fail.
#[derive(Debug, clap::Args)]
pub(crate) struct Lint {}

impl Lint {
    #[expect(
        clippy::unused_self,
        reason = "a task is run by its arguments, and this one has none"
    )]
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let checks = checks();
        let failed = checks.iter().filter(|check| !holds(check)).count();
        ensure!(failed == 0, "{failed} of {} checks failed", checks.len());
        Ok(ExitCode::SUCCESS)
    }
}

fn checks() -> Vec<Check> {
    vec![
        Check::new("lock files are up to date", lock_files),
        Check::new("dependency arrows point one way", || {
            holds_no(&arrows::wrong_arrows(&metadata()?))
        }),
        Check::new("no modules use each other in a circle", || {
            holds_no(&circles::of_modules()?)
        }),
        Check::new("dependencies are explained", || {
            holds_no(&arrows::unexplained_dependencies(&metadata()?)?)
        }),
        Check::new(
            "unsafe code is where it may be",
            || holds_no(&unsafe_code::misplaced()?),
        ),
        Check::new("skipped tests are reported by the testkit", || {
            holds_no(&skips::printed_by_hand()?)
        }),
        Check::new("links of the documentation resolve", || holds_no(&links::broken()?)),
        Check::new("the OpenAPI document is up to date", openapi::check_committed),
        Check::new("formatting", || formatting(cargo("fmt").arg("--all"))),
        Check::new("formatting of the guest", || {
            formatting(guest_command(cargo_path()).arg("fmt"))
        }),
        Check::new("clippy", || {
            tool::run(cargo("clippy").args([
                "--quiet",
                "--locked",
                "--workspace",
                "--all-targets",
                "--keep-going",
                "--",
                "-D",
                "warnings",
            ]))
        }),
        Check::new("clippy of the guest", clippy_of_the_guest),
        Check::new("rustdoc", || {
            tool::run(
                // The examples have dependencies whose features clippy used too: without them, most would be checked
                // again.
                cargo("doc")
                    .args(["--quiet", "--locked", "--workspace", "--no-deps"])
                    .args(["--lib", "--bins", "--examples"])
                    .env("RUSTDOCFLAGS", "-D warnings"),
            )
        }),
        Check::new("clippy of pagecast for other platforms", clippy_for_other_platforms),
    ]
}

/// Runs the check, and prints a line about it, with its problems.
fn holds(check: &Check) -> bool {
    let started = Instant::now();
    let spinner = Progress::spinner(check.name.clone());
    let outcome = (check.run)();
    drop(spinner);
    let seconds = started.elapsed().as_secs_f64();
    let verdict = match outcome {
        Ok(()) => style("ok    ").green(),
        Err(_) => style("FAILED").red().bold(),
    };
    let problems = match &outcome {
        Ok(()) => String::new(),
        Err(error) => format!("{error:#}\n\n"),
    };
    // A broken pipe does not stop the checks.
    let _ = write!(
        std::io::stdout(),
        "{verdict} {:<48} {seconds:6.1} s\n{problems}",
        check.name
    );
    outcome.is_ok()
}

/// An error with a line for each problem, if there are any.
fn holds_no(problems: &[String]) -> Result<()> {
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

fn formatting(fmt: &mut Command) -> Result<()> {
    tool::run(fmt.args(["--check", "--", "--color", tool::colour()]))
}

fn lock_files() -> Result<()> {
    metadata()?;
    let metadata_of_guest = ["metadata", "--locked", "--format-version", "1"];
    tool::run(guest_command(cargo_path()).args(metadata_of_guest)).context("the lock file of the guest")
}

fn clippy_of_the_guest() -> Result<()> {
    // Adds the guest's Rust target if it is missing.
    build_guest()?;
    let target_folder = metadata()?.target_directory.join("pagecast/guest");
    tool::run(
        guest_command(cargo_path())
            .args(["clippy", "--quiet", "--release", "--locked", "--target-dir"])
            .arg(target_folder)
            .args(["--", "-D", "warnings"]),
    )
}

/// Checks all platforms at once, to use all processors.
fn clippy_for_other_platforms() -> Result<()> {
    let mut clippy = cargo("clippy");
    // Includes the tests of the pure parts. Tests that need a simulated VMM exist on Linux only.
    clippy
        .args(["--quiet", "--locked", "--all-targets", "--keep-going"])
        .args(["--package", "pagecast", "--package", "pagecast-uffd"]);
    for platform in OTHER_PLATFORMS {
        target::ensure_installed(platform)?;
        clippy.args(["--target", platform]);
    }
    tool::run(clippy.args(["--", "-D", "warnings"]))
}
