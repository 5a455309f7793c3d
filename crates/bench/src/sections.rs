//! The sections, one after the other.

mod cold;
mod fanout;
pub(crate) mod faults;
pub(crate) mod growth;
mod idle;
mod in_process;
mod prefault;
pub(crate) mod ready;
mod turns;
mod working_set;
pub(crate) mod zeros;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::interrupt::Interrupt;
use crate::machine::Machine;
use crate::progress::Progress;
use crate::report::{Report, SectionReport};
use crate::rival::Rival;
use crate::section::{Scale, Section};

/// Time that steps which are not measured may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// The benchmark to run.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The sections.
    pub sections: Vec<Section>,
    /// The scale.
    pub scale: Scale,
    /// The command that starts daemons. Simulated VMMs are processes of this program (see [`sim_vmm`](crate::sim_vmm)).
    pub pagecast: PathBuf,
    /// Another page server, for single faults.
    pub rival: Option<Rival>,
}

/// Runs the benchmark. Reports progress on stderr; `done` gets each section when it is finished.
///
/// # Errors
///
/// A step fails, or a signal came; those of `done`.
pub fn run(bench: &Bench, interrupt: &Interrupt, mut done: impl FnMut(&SectionReport) -> Result<()>) -> Result<Report> {
    let machine = Machine::here();
    let started = Instant::now();
    let mut sections = Vec::new();
    for section in &bench.sections {
        interrupt.check()?;
        let began = Instant::now();
        let measured = measure(*section, bench, interrupt);
        // A failure after a signal is caused by it.
        let measured = measured.map_err(|error| interrupt.check().err().unwrap_or(error));
        let mut report = measured.with_context(|| format!("the section \"{}\" failed", section.name()))?;
        report.seconds = began.elapsed().as_secs_f64();
        done(&report)?;
        sections.push(report);
    }
    Ok(Report {
        machine,
        scale: bench.scale,
        sections,
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn measure(section: Section, bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    match section {
        Section::Faults => faults::measure(bench, interrupt),
        Section::Ready => ready::measure(bench, interrupt),
        Section::Prefault => prefault::measure(bench, interrupt),
        Section::Zeros => zeros::measure(bench, interrupt),
        Section::Fanout => fanout::measure(bench, interrupt),
        Section::Growth => growth::measure(bench, interrupt),
    }
}

/// Progress over the rounds of a section.
fn rounds(section: Section, count: u32) -> Progress {
    Progress::of(section.name(), "rounds", count.into())
}

/// A temporary folder.
fn folder() -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("pagecast-bench-")
        .tempdir()
        .context("failed to create a folder")
}
