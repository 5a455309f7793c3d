//! `cargo xtask demo`: forks of one template with each backend; checks every byte, and compares their cost.

mod report;
mod scenario;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use pagecast_bench::fleet::{Kind, Size, create_template};
use pagecast_bench::interrupt::Interrupt;
use pagecast_bench::progress::say;
use pagecast_client::Backend;

use self::report::Report;
use self::scenario::{Scenario, Way};
use crate::cargo::build_pagecast;

/// The template. Each fork reads all its data.
const SIZE: Size = Size {
    mem_mib: 128,
    data_mib: 64,
};

/// What is compared, in the order of the columns. The first is the default. Once a working set is known, it is prefaulted.
const WAYS: [Way; 3] = [
    Way {
        name: "auto",
        backend: Backend::Auto,
        is_trained: false,
    },
    Way {
        name: "uffd",
        backend: Backend::Uffd,
        is_trained: false,
    },
    Way {
        name: "uffd, working set known",
        backend: Backend::Uffd,
        is_trained: true,
    },
];

/// Fork one microVM many times with each backend, check every byte, and compare their cost
///
/// Boots a tiny guest in Firecracker and snapshots it. Then, for each backend, and for `uffd` with and without a known
/// working set, starts `pagecast serve`, creates the
/// forks and restores all at once. Every guest reads and checks its working set, writes to a part of it, and checks it
/// again. Then it checks all its memory, and once more after the server has ended. Without KVM, simulated VMMs do the
/// same. Fetches and builds all it needs; leaves only files in the target folder.
///
/// The exit code is 0 if every byte was right, 1 if a byte was wrong or an error occurred, 128 and the signal if
/// interrupted.
#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// Number of forks with each backend
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    forks: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Demo {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let interrupt = Interrupt::watch()?;
        let outcome = self.show(&interrupt);
        if let Some(code) = interrupt.exit_code() {
            say("interrupted: every process was ended, every temporary file removed");
            return Ok(code);
        }
        let report = outcome?;
        report.print(self.json)?;
        ensure!(report.mismatches() == 0, "some guests read wrong bytes");
        Ok(ExitCode::SUCCESS)
    }

    fn show(&self, interrupt: &Interrupt) -> Result<Report> {
        let kind = Kind::here()?;
        if let Kind::Simulated(why) = &kind {
            say(&format!("{why}: simulated VMMs take the place of Firecracker"));
        }
        let pagecast = build_pagecast()?;
        let folder = tempfile::Builder::new()
            .prefix("pagecast-demo-")
            .tempdir()
            .context("failed to create a folder for the template")?;
        let template = create_template(&kind, folder.path(), SIZE)?;
        interrupt.check()?;

        let mut played = Vec::new();
        for way in WAYS {
            say("");
            let scenario = Scenario {
                pagecast: &pagecast,
                template: &*template,
                forks: self.forks,
                way,
                interrupt,
            };
            played.push(scenario.play(&folder_of(folder.path(), way)?)?);
        }
        Ok(Report::new(&kind, &played))
    }
}

fn folder_of(folder: &Path, way: Way) -> Result<std::path::PathBuf> {
    let folder = folder.join(way.name);
    std::fs::create_dir(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    Ok(folder)
}
