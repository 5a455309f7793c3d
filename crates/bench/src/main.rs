//! The `pagecast-bench` command: the cost of pagecast on this machine, beside floors and rivals.
#![forbid(unsafe_code)]

mod tables;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use pagecast_bench::goal::Verdict;
use pagecast_bench::interrupt::Interrupt;
use pagecast_bench::progress::say;
use pagecast_bench::report::Report;
use pagecast_bench::rival::Rival;
use pagecast_bench::section::{Scale, Section};
use pagecast_bench::{Bench, plots, sim_vmm};
use pagecast_command::Output;

use crate::tables::Tables;

/// The name that stands for stdout.
const STDOUT: &str = "-";

/// Measure the cost of pagecast on this machine, beside a floor and rivals
///
/// Each number stands beside a floor, the smallest program that does the same job, and beside the strategies of others.
/// Subjects take turns, so that a disturbance affects all, and ratios are those of paired turns. The output describes
/// floors, rivals and method.
///
/// Real Firecrackers are measured if there is /dev/kvm and the source tree of this build, else simulated VMMs.
/// Firecracker is found by `PAGECAST_FIRECRACKER` or on PATH, or fetched. All started processes are ended, and only
/// requested files are left behind.
///
/// The exit code is 0 even if a goal is missed, or 4 with --check; 1 if an error occurred, 128 and the signal if
/// interrupted.
#[derive(Debug, Parser)]
#[command(name = "pagecast-bench", version)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct Cli {
    /// Measure less: all sections in under a minute
    #[arg(long)]
    quick: bool,

    /// Measure the minimum that shows that every section works
    #[arg(long, hide = true, conflicts_with = "quick")]
    tiny: bool,

    /// Measure only this section
    #[arg(long, value_enum, value_name = "SECTION", num_args = 1.., value_delimiter = ',')]
    only: Vec<Section>,

    /// Write all measurements as JSON to this file, or to stdout, which then gets nothing else
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = STDOUT)]
    json: Option<PathBuf>,

    /// Draw the measurements as SVG and PNG files in this folder
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,

    /// Print tables as Markdown
    #[arg(long)]
    markdown: bool,

    /// Exit with 4 if a goal is missed
    #[arg(long)]
    check: bool,

    /// The command whose daemon is measured [default: the one beside this program, else on PATH]
    #[arg(long, value_name = "PATH")]
    pagecast: Option<PathBuf>,

    /// The shell command of another page server, to measure single faults beside it. It gets the paths `{socket}` of the socket to
    /// listen at, for one VMM, and `{mem}` of the memory file
    #[arg(long, value_name = "COMMAND")]
    rival: Option<Rival>,
}

/// The exit code for a missed goal with `--check`.
const MISSED: u8 = 4;

impl Cli {
    fn run(&self) -> Result<ExitCode> {
        let interrupt = Interrupt::watch()?;
        let outcome = self.measure(&interrupt);
        if let Some(code) = interrupt.exit_code() {
            say("pagecast-bench: interrupted; every process was ended, every temporary file removed");
            return Ok(code);
        }
        let report = outcome?;
        let missed = report.goals().any(|(_, goal)| goal.verdict == Verdict::Missed);
        Ok(if self.check && missed {
            ExitCode::from(MISSED)
        } else {
            ExitCode::SUCCESS
        })
    }

    fn measure(&self, interrupt: &Interrupt) -> Result<Report> {
        ensure!(
            !cfg!(debug_assertions) || self.tiny,
            "this pagecast-bench was built without optimisation, so its numbers have no meaning: use `cargo xtask bench`, or \
             build with --release"
        );
        // Checked before the measurements, which take minutes.
        for folder in [self.plots.as_deref(), self.json.as_deref().and_then(Path::parent)] {
            let Some(folder) = folder.filter(|folder| !folder.as_os_str().is_empty()) else {
                continue;
            };
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let tables = Tables {
            output: Output::stdout(),
            markdown: self.markdown,
        };
        let only: BTreeSet<Section> = self.only.iter().copied().collect();
        let bench = Bench {
            sections: if only.is_empty() {
                Section::ALL.to_vec()
            } else {
                only.into_iter().collect()
            },
            scale: match (self.tiny, self.quick) {
                (true, _) => Scale::Tiny,
                (_, true) => Scale::Quick,
                _ => Scale::Full,
            },
            pagecast: self.pagecast()?,
            rival: self.rival.clone(),
        };
        let json_only = self.json.as_deref() == Some(Path::new(STDOUT));
        if self.markdown && !json_only {
            tables.output.print("# pagecast-bench\n")?;
        }
        let report = pagecast_bench::run(&bench, interrupt, |section| {
            if json_only {
                Ok(())
            } else {
                tables.output.print(&tables.section(section))
            }
        })?;
        if json_only {
            tables.output.print_json(&report)?;
        } else {
            tables.output.print(&tables.end(&report))?;
        }
        if let Some(path) = self.json.as_deref().filter(|_| !json_only) {
            let json = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
            fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
        if let Some(folder) = &self.plots {
            plots::draw(&report, folder)?;
        }
        Ok(report)
    }

    /// The command that starts daemons.
    fn pagecast(&self) -> Result<PathBuf> {
        if let Some(path) = &self.pagecast {
            ensure!(path.is_file(), "--pagecast: {} is not a file", path.display());
            return Ok(path.clone());
        }
        let ourselves = std::env::current_exe().context("cannot find this program")?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let beside = ourselves.parent().map(Path::to_owned);
        let mut candidates = beside
            .into_iter()
            .chain(std::env::split_paths(&path))
            .map(|folder| folder.join("pagecast"));
        candidates
            .find(|candidate| candidate.is_file())
            .context("there is no pagecast beside this program or on PATH: name it with --pagecast")
    }
}

fn main() -> ExitCode {
    let outcome = if sim_vmm::asked_for() {
        sim_vmm::run().map(|()| ExitCode::SUCCESS)
    } else {
        Cli::parse().run()
    };
    outcome.unwrap_or_else(|error| {
        say(&format!("pagecast-bench: {error:#}"));
        ExitCode::FAILURE
    })
}
