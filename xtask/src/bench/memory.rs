//! `cargo xtask bench memory`: what real forks cost together, beside the least that they could.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use pagecast_client::Backend;
use pagecast_testkit::firecracker::{Kvm, kvm};
use pagecast_testkit::process::MemoryUse;
use serde::Serialize;

use super::goal::Goal;
use super::spread::{mib, to_f64};
use super::write_json;
use crate::cargo::build_pagecast;
use crate::fanout::{DATA_MIB, Played, Scenario, WRITE_EVERY, create_template};
use crate::interrupt::Interrupt;

/// `file` is to be at most so many times the least that the forks could cost.
const GOAL: Goal = Goal::AtMost(1.1);

/// Measure what real forks cost together with each backend, beside the least that they could
///
/// Restores real Firecrackers from one snapshot, has each guest read its working set of 64 MiB and write to 1/8 of its
/// pages, and adds up the proportional set sizes (PSS) of their processes. The least that they could cost: one working set,
/// all that the guests wrote, and as many Firecrackers without a guest, measured just before in the same processes. Needs
/// /dev/kvm.
#[derive(Debug, Args)]
pub(super) struct Memory {
    /// How many forks with each backend
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    forks: u32,

    /// Where to write all that was measured
    #[arg(long, value_name = "FILE", default_value = "target/bench-memory.json")]
    json: PathBuf,
}

/// What forks with one backend cost, in bytes.
#[derive(Debug, Serialize)]
struct Row {
    backend: Backend,
    forks: u64,
    /// Read by each guest, the same by all.
    working_set: u64,
    /// Written by all guests.
    written: u64,
    /// The PSS of all Firecrackers before they had a guest.
    blank: u64,
    /// The PSS of all Firecrackers when their guests had been resumed and not been asked for anything.
    idle: u64,
    /// One working set, what was written, and the Firecrackers without a guest.
    least: u64,
    /// The PSS of all of them in the end.
    pss: u64,
    private: u64,
    /// Their resident sets: what they would cost if they shared nothing.
    rss: u64,
    mismatches: u64,
    /// PSS to the least.
    ratio: f64,
    goal: Option<Goal>,
    met: Option<bool>,
}

impl Memory {
    /// Measures, prints a table, writes JSON; whether the goal was met.
    pub(super) fn run(&self) -> Result<bool> {
        let interrupt = Interrupt::watch()?;
        let kvm = kvm()?;
        if let Kvm::Missing(why) = &kvm {
            bail!("the memory of real forks cannot be measured here: {why}");
        }
        let pagecast = build_pagecast()?;
        let folder = tempfile::tempdir().context("failed to create a folder for the template")?;
        let template = create_template(&kvm, folder.path())?;
        let mut rows = Vec::new();
        for backend in [Backend::File, Backend::Uffd] {
            let scenario = Scenario {
                pagecast: &pagecast,
                template: &*template,
                forks: self.forks,
                backend,
                interrupt: &interrupt,
            };
            let folder = folder.path().join(backend.to_string());
            std::fs::create_dir(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
            rows.push(Row::new(&scenario.play(&folder)?));
        }
        println!("{}", table(&rows));
        println!(
            "MiB, of {} Firecrackers together; least: one working set, all that was written, and the Firecrackers without a \
             guest\nfile: {} x the least, goal {GOAL}: {}",
            self.forks,
            rows.first().map_or("-".to_owned(), |file| format!("{:.3}", file.ratio)),
            Goal::verdict(rows.first().and_then(|file| file.met)),
        );
        write_json(&self.json, &rows)?;
        ensure!(
            rows.iter().all(|row| row.mismatches == 0),
            "some guests read wrong bytes"
        );
        Ok(rows.iter().all(|row| row.met != Some(false)))
    }
}

impl Row {
    fn new(played: &Played) -> Self {
        let sum = |of: fn(&MemoryUse) -> u64| played.forks.iter().map(|fork| of(&fork.memory)).sum::<u64>();
        let pss_of = |vmms: &[MemoryUse]| vmms.iter().map(|vmm| vmm.pss_bytes).sum::<u64>();
        let forks = played.forks.len() as u64;
        let working_set = u64::from(DATA_MIB) << 20;
        let written = forks * working_set / u64::from(WRITE_EVERY);
        let blank = pss_of(&played.blank);
        let least = working_set + written + blank;
        let pss = sum(|memory| memory.pss_bytes);
        let ratio = to_f64(pss) / to_f64(least);
        // What is copied for each fork cannot be shared, whoever copies it.
        let goal = (played.backend == Backend::File).then_some(GOAL);
        Self {
            backend: played.backend,
            forks,
            working_set,
            written,
            blank,
            idle: pss_of(&played.idle),
            least,
            pss,
            private: sum(|memory| memory.private_bytes),
            rss: sum(|memory| memory.rss_bytes),
            mismatches: played.forks.iter().map(|fork| fork.mismatches.count).sum(),
            ratio,
            goal,
            met: goal.map(|goal| goal.is_met(ratio)),
        }
    }
}

/// A line of the table: what it is, and how many bytes.
type Line = (&'static str, fn(&Row) -> u64);

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let mut header = vec![String::new()];
    header.extend(rows.iter().map(|row| row.backend.to_string()));
    table.set_header(header);
    let lines: [Line; 8] = [
        ("one working set", |row| row.working_set),
        ("written by all guests", |row| row.written),
        ("without a guest, PSS", |row| row.blank),
        ("least", |row| row.least),
        ("resumed and idle, PSS", |row| row.idle),
        ("PSS", |row| row.pss),
        ("private", |row| row.private),
        ("without sharing", |row| row.rss),
    ];
    for (title, bytes) in lines {
        let cells = rows.iter().map(|row| format!("{:.1}", mib(bytes(row))));
        table.add_row(line(title, cells));
    }
    table.add_row(line("PSS to least", rows.iter().map(|row| format!("{:.3}", row.ratio))));
    table
}

fn line(title: &str, values: impl Iterator<Item = String>) -> Vec<Cell> {
    let values = values.map(|value| Cell::new(value).set_alignment(CellAlignment::Right));
    std::iter::once(Cell::new(title)).chain(values).collect()
}
