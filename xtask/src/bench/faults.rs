//! `cargo xtask bench faults`: what a page fault costs, beside the smallest program that could do the same.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use pagecast::Template;
use pagecast::server::{ForkOptions, ForkState, Server};
use pagecast_testkit::floor::Floor;
use pagecast_testkit::process::ProcessUse;
use pagecast_testkit::sim_vmm::{Connect, Latency, Order, Pages, SimVmm, Touch};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use serde::Serialize;

use super::goal::Goal;
use super::spread::{Spread, to_f64};
use super::write_json;

/// The template: data on every page, and in the page cache.
const TEMPLATE_BYTES: u64 = 64 << 20;
/// Pages that the one fork touches.
const PAGES_ALONE: u64 = TEMPLATE_BYTES / 4096;
const FORKS: usize = 20;
/// Pages that each of twenty forks touches.
const PAGES_EACH: u64 = 4096;
const PATIENCE: Duration = Duration::from_mins(1);

/// Measure what a page fault costs, beside the floor: a bare loop of a blocking read and a copy, a thread a fork.
///
/// Floor and pagecast take turns, round by round, so that what disturbs the one disturbs the other. Ratios are medians of
/// the rounds' own ratios.
#[derive(Clone, Debug, Args)]
pub(super) struct Faults {
    /// How many rounds.
    #[arg(long, default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How many threads of pagecast answer faults [default: as it chooses]
    #[arg(long)]
    workers: Option<usize>,

    /// Where to write all that was measured.
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum System {
    Floor,
    Pagecast,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Measure {
    OneForkP50,
    OneForkP99,
    TwentyForksP50,
    TwentyForksP99,
    TwentyForksFaultsPerSecond,
    ServerCpuPerFault,
}

impl Measure {
    const ALL: [Self; 6] = [
        Self::OneForkP50,
        Self::OneForkP99,
        Self::TwentyForksP50,
        Self::TwentyForksP99,
        Self::TwentyForksFaultsPerSecond,
        Self::ServerCpuPerFault,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::OneForkP50 => "1 fork, one fault after the other: p50, us",
            Self::OneForkP99 => "1 fork, one fault after the other: p99, us",
            Self::TwentyForksP50 => "20 forks at once: p50, us",
            Self::TwentyForksP99 => "20 forks at once: p99, us",
            Self::TwentyForksFaultsPerSecond => "20 forks at once: faults per second",
            Self::ServerCpuPerFault => "20 forks at once: CPU of the server per fault, us",
        }
    }

    /// What pagecast has to be, as a ratio to the floor.
    fn goal(self) -> Option<Goal> {
        match self {
            Self::OneForkP50 => Some(Goal::AtMost(1.3)),
            Self::TwentyForksFaultsPerSecond => Some(Goal::AtLeast(0.8)),
            _ => None,
        }
    }
}

/// One turn of one system, a value for each of [`Measure::ALL`].
type Values = [f64; Measure::ALL.len()];

/// A row of the result.
#[derive(Debug, Serialize)]
struct Row {
    measure: Measure,
    floor: Spread,
    pagecast: Spread,
    ratio: Spread,
    goal: Option<Goal>,
    met: Option<bool>,
}

impl Faults {
    /// Measures, prints a table, writes JSON; whether all goals were met.
    pub(super) fn run(&self) -> Result<bool> {
        let file = TemplateFile::create(TemplateModel::of_data(TEMPLATE_BYTES, 1))?;
        let progress = progress(u64::from(self.rounds));
        let mut floor = Vec::new();
        let mut pagecast = Vec::new();
        for round in 0..self.rounds {
            // Who goes first changes too.
            let mut turns = [System::Floor, System::Pagecast];
            if round % 2 == 1 {
                turns.reverse();
            }
            for system in turns {
                progress.set_message(format!("{system:?}").to_lowercase());
                let values = self.turn(system, &file)?;
                match system {
                    System::Floor => floor.push(values),
                    System::Pagecast => pagecast.push(values),
                }
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        let rows = rows(&floor, &pagecast);
        println!("{}", table(&rows));
        println!(
            "{} rounds; median (min to max); ratio: pagecast to floor, the median of the rounds' own",
            self.rounds
        );
        write_json(&self.json, &rows)?;
        Ok(rows.iter().all(|row| row.met != Some(false)))
    }

    fn turn(&self, system: System, file: &TemplateFile) -> Result<Values> {
        let alone = self.forks(system, file, 1, |vmms| {
            let work = Latency {
                pages: Pages::range(0..PAGES_ALONE),
                order: Order::Random(1),
            };
            vmms[0].run(work)
        })?;
        let mut many = self.forks(system, file, FORKS, |vmms| {
            let jobs = start_all(vmms, |fork| Latency {
                pages: Pages::range(0..PAGES_EACH),
                order: Order::Random(fork),
            })?;
            jobs.into_iter()
                .map(pagecast_testkit::sim_vmm::Job::join)
                .collect::<Result<Vec<_>>>()
        })?;
        let (faults_per_second, cpu_per_fault) = self.forks(system, file, FORKS, |vmms| {
            let cpu_before = ProcessUse::of(std::process::id())?.cpu_time;
            let started = Instant::now();
            let jobs = start_all(vmms, |fork| Touch {
                pages: Pages::range(0..PAGES_EACH),
                threads: 1,
                order: Order::Random(fork),
            })?;
            let touched = jobs.into_iter().map(|job| Ok(job.join()?.pages)).sum::<Result<u64>>()?;
            let elapsed = started.elapsed();
            // Floor and server run in this process, and nothing else does meanwhile.
            let cpu = ProcessUse::of(std::process::id())?.cpu_time.saturating_sub(cpu_before);
            let faults = to_f64(touched);
            Ok((faults / elapsed.as_secs_f64(), cpu.as_secs_f64() * 1e6 / faults))
        })?;
        // The forks' own figures differ little; the one in the middle stands for all.
        let mut middle = |key: fn(&pagecast_testkit::sim_vmm::LatencyReport) -> u64| {
            many.sort_unstable_by_key(key);
            key(&many[many.len() / 2])
        };
        Ok([
            micros(alone.p50_ns),
            micros(alone.p99_ns),
            micros(middle(|report| report.p50_ns)),
            micros(middle(|report| report.p99_ns)),
            faults_per_second,
            cpu_per_fault,
        ])
    }

    /// Lets `measure` have so many fresh forks, served by `system`.
    fn forks<T>(
        &self,
        system: System,
        file: &TemplateFile,
        count: usize,
        measure: impl FnOnce(&[SimVmm]) -> Result<T>,
    ) -> Result<T> {
        let folder = tempfile::tempdir()?;
        let vmms = (0..count).map(|_| SimVmm::spawn()).collect::<Result<Vec<_>>>()?;
        match system {
            System::Floor => {
                let floor = Floor::start(&folder.path().join("floor"), file.path(), count)?;
                for vmm in &vmms {
                    vmm.run(Connect::new(floor.socket(), file.model()))?;
                }
                floor.wait_until_all_have_connected();
                measure(&vmms)
            }
            System::Pagecast => {
                let template = Template::open(file.path())?;
                let mut builder = Server::builder();
                if let Some(workers) = self.workers {
                    builder = builder.workers(workers);
                }
                let server = builder.start()?;
                for (number, vmm) in vmms.iter().enumerate() {
                    let id = format!("fork-{number}").parse()?;
                    let options = ForkOptions::new(folder.path().join(number.to_string()));
                    let fork = server.register(id, &template, &options)?;
                    vmm.run(Connect::new(fork.socket_path(), file.model()))?;
                    let status = fork.wait(PATIENCE, |state| state != ForkState::Waiting);
                    ensure!(status.state == ForkState::Serving, "not served: {status:?}");
                }
                let measured = measure(&vmms);
                server.kill(PATIENCE)?;
                measured
            }
        }
    }
}

fn start_all<W: pagecast_testkit::sim_vmm::Work>(
    vmms: &[SimVmm],
    work: impl Fn(u64) -> W,
) -> Result<Vec<pagecast_testkit::sim_vmm::Job<W::Report>>> {
    (0..).zip(vmms).map(|(fork, vmm)| vmm.start(work(fork))).collect()
}

fn rows(floor: &[Values], pagecast: &[Values]) -> Vec<Row> {
    let row = |(index, measure): (usize, Measure)| {
        let ratio = Spread::of(
            floor
                .iter()
                .zip(pagecast)
                .map(|(floor, pagecast)| pagecast[index] / floor[index]),
        );
        let goal = measure.goal();
        Row {
            measure,
            floor: Spread::of(floor.iter().map(|values| values[index])),
            pagecast: Spread::of(pagecast.iter().map(|values| values[index])),
            ratio,
            goal,
            met: goal.map(|goal| goal.is_met(ratio.median)),
        }
    };
    Measure::ALL.into_iter().enumerate().map(row).collect()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "floor", "pagecast", "ratio", "goal", ""]);
    for row in rows {
        let digits = usize::from(row.floor.median < 1000.0);
        let spread = |spread: Spread, digits: usize| {
            let Spread { min, median, max } = spread;
            Cell::new(format!("{median:.digits$} ({min:.digits$} to {max:.digits$})"))
                .set_alignment(CellAlignment::Right)
        };
        table.add_row([
            Cell::new(row.measure.title()),
            spread(row.floor, digits),
            spread(row.pagecast, digits),
            spread(row.ratio, 2),
            Cell::new(row.goal.as_ref().map(Goal::to_string).unwrap_or_default()),
            Cell::new(Goal::verdict(row.met)),
        ]);
    }
    table
}

fn progress(rounds: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} round {pos} of {len}, {eta} left: {msg}");
    ProgressBar::new(rounds).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn micros(nanos: u64) -> f64 {
    to_f64(nanos) / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let floor = [[1.0; 6], [10.0; 6], [100.0; 6]];
        let pagecast = [[1.2; 6], [9.0; 6], [130.0; 6]];
        let rows = rows(&floor, &pagecast);
        assert!((rows[0].ratio.median - 1.2).abs() < 1e-9);
        assert_eq!(rows[0].met, Some(true));
        assert_eq!(rows[4].met, Some(true));
        assert_eq!(rows[1].met, None);
    }
}
