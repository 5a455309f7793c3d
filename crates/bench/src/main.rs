//! The `pagecast-bench` command: what pagecast costs on this machine, beside floors and rivals.
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
use pagecast_bench::section::{Scale, Section};
use pagecast_bench::{Bench, plots, sim_vmm};
use pagecast_command::Output;

use crate::tables::Tables;

/// Where JSON goes if no file is named.
const STDOUT: &str = "-";

/// Measure what pagecast costs on this machine, beside the least that it could cost and beside others
///
/// Each number stands beside a floor, the smallest program that does the same job, and beside what others do. Who is
/// compared takes turns, so that what disturbs the one disturbs the other; ratios are those of paired turns. Floors,
/// rivals and what was done are named with the numbers.
///
/// Real Firecrackers are measured where there is /dev/kvm and the source tree that this was built from (Firecracker itself
/// is found by `PAGECAST_FIRECRACKER`, on PATH, or fetched), simulated VMMs elsewhere. Everything it starts it ends, and
/// it leaves no files behind but those that were asked for.
///
/// The exit code is 0 also where a goal is missed, unless --check asks for 4; 1 if something failed, 128 and the signal
/// if interrupted.
#[derive(Debug, Parser)]
#[command(name = "pagecast-bench", version)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct Cli {
    /// Measure less: all of it in under a minute
    #[arg(long)]
    quick: bool,

    /// As little as shows that all of it works
    #[arg(long, hide = true, conflicts_with = "quick")]
    tiny: bool,

    /// Measure only this
    #[arg(long, value_enum, value_name = "SECTION", num_args = 1.., value_delimiter = ',')]
    only: Vec<Section>,

    /// Write all that was measured as JSON: into a file, or to stdout and nothing else there
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = STDOUT)]
    json: Option<PathBuf>,

    /// Draw what was measured, as SVG and PNG files in this folder
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,

    /// Print tables as Markdown
    #[arg(long)]
    markdown: bool,

    /// Exit with 4 where a goal is missed
    #[arg(long)]
    check: bool,

    /// The command whose daemon is measured. Without it, the one beside this program, or else on PATH
    #[arg(long, value_name = "PATH")]
    pagecast: Option<PathBuf>,
}

/// The exit code where a goal is missed and `--check` was given.
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
            "this pagecast-bench was built without optimisation: its numbers would mean nothing (use `cargo xtask bench`, or build \
             with --release)"
        );
        // What cannot be written is better known before the minutes have passed.
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

    /// The command to run daemons of.
    fn pagecast(&self) -> Result<PathBuf> {
        if let Some(path) = &self.pagecast {
            ensure!(path.is_file(), "--pagecast: {} is no file", path.display());
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
