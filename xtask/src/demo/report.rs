//! The result of the demo, for people and for programs.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Color, Table, presets};
use pagecast_bench::fleet::{Kind, Size, WRITE_EVERY};
use pagecast_client::Backend;
use serde::Serialize;

use super::SIZE;
use super::scenario::{Played, PlayedFork};

/// The result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Why VMMs were simulated. `None` with Firecracker.
    simulated_because: Option<String>,
    backends: Vec<BackendReport>,
}

/// The result of one backend.
#[derive(Debug, Serialize)]
struct BackendReport {
    name: &'static str,
    asked: Backend,
    backend: Backend,
    reason: String,
    totals: Totals,
    forks: Vec<ForkReport>,
}

#[derive(Debug, Serialize)]
struct ForkReport {
    fork: u32,
    pid: u32,
    /// Load and resume.
    resumed_ms: f64,
    /// Load, resume, and reading and checking the working set.
    read_ms: f64,
    /// Wrong words, or pages if VMMs are simulated.
    mismatches: u64,
    first_mismatch: Option<String>,
    private_bytes: u64,
    pss_bytes: u64,
    rss_bytes: u64,
    /// `None` if the kernel answers the faults.
    demand_faults: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Totals {
    resumed_ms: Times,
    read_ms: Times,
    mismatches: u64,
    /// The median of the forks.
    private_bytes_a_fork: u64,
    pss_bytes_a_fork: u64,
    /// The sum of all forks.
    pss_bytes: u64,
    /// Memory without sharing: the sum of all resident memory.
    unshared_bytes: u64,
    demand_faults: Option<u64>,
    /// The median of the forks' medians.
    fault_p50_us: Option<u64>,
    /// The maximum of the forks' 99th percentiles.
    fault_p99_us: Option<u64>,
    server_own_bytes: u64,
    server_rss_bytes: u64,
    server_cpu_s: f64,
}

/// The sum of all forks.
#[derive(Debug, Serialize)]
struct Times {
    median: f64,
    worst: f64,
}

impl Report {
    pub(super) fn new(kind: &Kind, played: &[Played]) -> Self {
        Self {
            simulated_because: match kind {
                Kind::Firecracker => None,
                Kind::Simulated(why) => Some(why.clone()),
            },
            backends: played.iter().map(BackendReport::new).collect(),
        }
    }

    pub(super) fn mismatches(&self) -> u64 {
        self.backends.iter().map(|backend| backend.totals.mismatches).sum()
    }

    /// Prints to stdout, which gets nothing else.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        let text = if json {
            serde_json::to_string_pretty(self).context("failed to write JSON")? + "\n"
        } else {
            self.for_people()
        };
        match std::io::stdout().write_all(text.as_bytes()) {
            // The reader has closed the pipe.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => written.context("failed to write the result"),
        }
    }

    fn for_people(&self) -> String {
        let vmms = match &self.simulated_because {
            None => "Firecracker microVMs".to_owned(),
            Some(why) => format!("SIMULATED VMMs, not Firecracker ({why}),"),
        };
        let Size { mem_mib, data_mib } = SIZE;
        let mut text = String::new();
        let _ = writeln!(
            text,
            "\n{} {vmms} of {mem_mib} MiB each time, forked from one template;\neach read {data_mib} MiB and wrote to \
             1/{WRITE_EVERY} of its pages\n\n{}",
            self.backends.first().map_or(0, |backend| backend.forks.len()),
            self.table()
        );
        for backend in &self.backends {
            let _ = match (backend.asked, backend.backend) {
                (asked, got) if asked == got => Ok(()),
                (asked, got) => writeln!(text, "`{asked}` chose `{got}`: {}", backend.reason),
            };
            for fork in &backend.forks {
                if let Some(first) = &fork.first_mismatch {
                    let _ = writeln!(
                        text,
                        "{} fork {}: first mismatch at {first}",
                        backend.backend, fork.fork
                    );
                }
            }
        }
        text
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        if !console::colors_enabled() {
            table.force_no_tty();
        }
        let mut header = vec![String::new()];
        header.extend(self.backends.iter().map(BackendReport::title));
        table.set_header(header);
        for (title, value) in ROWS {
            let mut row = vec![Cell::new(title)];
            row.extend(self.backends.iter().map(|backend| {
                let cell = Cell::new(value(&backend.totals)).set_alignment(CellAlignment::Right);
                match backend.totals.mismatches {
                    0 => cell,
                    _ => cell.fg(Color::Red),
                }
            }));
            table.add_row(row);
        }
        table
    }
}

/// A row of the table: its title and its value.
type Row = (&'static str, fn(&Totals) -> String);

const ROWS: [Row; 11] = [
    ("resumed, ms: median (worst)", |totals| totals.resumed_ms.for_people()),
    ("working set read, ms: median (worst)", |totals| {
        totals.read_ms.for_people()
    }),
    ("mismatches, in four checks", |totals| totals.mismatches.to_string()),
    ("a fork, private MiB: median", |totals| mib(totals.private_bytes_a_fork)),
    ("a fork, PSS MiB: median", |totals| mib(totals.pss_bytes_a_fork)),
    ("all forks, PSS MiB", |totals| mib(totals.pss_bytes)),
    ("the same without sharing, MiB", |totals| mib(totals.unshared_bytes)),
    ("faults answered by pagecast", |totals| {
        totals
            .demand_faults
            .map_or("none".to_owned(), |faults| faults.to_string())
    }),
    ("a fault, us: p50 (worst p99)", |totals| {
        let both = totals.fault_p50_us.zip(totals.fault_p99_us);
        both.map_or("-".to_owned(), |(p50, p99)| format!("{p50} ({p99})"))
    }),
    ("server, private MiB (resident)", |totals| {
        format!("{} ({})", mib(totals.server_own_bytes), mib(totals.server_rss_bytes))
    }),
    ("server, CPU s", |totals| format!("{:.2}", totals.server_cpu_s)),
];

impl BackendReport {
    fn new(played: &Played) -> Self {
        let forks: Vec<_> = played.forks.iter().map(ForkReport::new).collect();
        let sum = |of: fn(&ForkReport) -> u64| forks.iter().map(of).sum();
        let middle = |of: fn(&ForkReport) -> u64| median(forks.iter().map(of).collect());
        let latencies = || played.forks.iter().filter_map(|fork| fork.fault_latency_us);
        let served = latencies().next().is_some();
        let totals = Totals {
            resumed_ms: Times::of(forks.iter().map(|fork| fork.resumed_ms)),
            read_ms: Times::of(forks.iter().map(|fork| fork.read_ms)),
            mismatches: sum(|fork| fork.mismatches),
            private_bytes_a_fork: middle(|fork| fork.private_bytes),
            pss_bytes_a_fork: middle(|fork| fork.pss_bytes),
            pss_bytes: sum(|fork| fork.pss_bytes),
            unshared_bytes: sum(|fork| fork.rss_bytes),
            demand_faults: served.then(|| sum(|fork| fork.demand_faults.unwrap_or_default())),
            fault_p50_us: served.then(|| median(latencies().map(|latency| latency.p50).collect())),
            fault_p99_us: latencies().map(|latency| latency.p99).max(),
            server_own_bytes: played.server.own_bytes,
            server_rss_bytes: played.server.rss_bytes,
            server_cpu_s: played.server.cpu_time.as_secs_f64(),
        };
        Self {
            name: played.way.name,
            asked: played.way.backend,
            backend: played.backend,
            reason: played.reason.clone(),
            totals,
            forks,
        }
    }

    fn title(&self) -> String {
        if self.asked == self.backend {
            self.name.to_owned()
        } else {
            format!("{} ({})", self.name, self.backend)
        }
    }
}

impl ForkReport {
    fn new(fork: &PlayedFork) -> Self {
        Self {
            fork: fork.number,
            pid: fork.pid,
            resumed_ms: milliseconds(fork.resumed_in),
            read_ms: milliseconds(fork.read_in),
            mismatches: fork.mismatches.count,
            first_mismatch: fork.mismatches.first.clone(),
            private_bytes: fork.memory.private_bytes,
            pss_bytes: fork.memory.pss_bytes,
            rss_bytes: fork.memory.rss_bytes,
            demand_faults: fork.faults.map(|faults| faults.demand),
        }
    }
}

impl Times {
    fn of(times: impl Iterator<Item = f64>) -> Self {
        let mut times: Vec<f64> = times.collect();
        times.sort_unstable_by(f64::total_cmp);
        Self {
            median: times.get(times.len() / 2).copied().unwrap_or_default(),
            worst: times.last().copied().unwrap_or_default(),
        }
    }

    fn for_people(&self) -> String {
        format!("{:.0} ({:.0})", self.median, self.worst)
    }
}

/// Rounded to the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Rounded to one decimal.
pub(crate) fn mib(bytes: u64) -> String {
    let tenths = (bytes * 10 + (1 << 19)) >> 20;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mebibytes_are_rounded_to_a_tenth() {
        assert_eq!(mib(0), "0.0");
        assert_eq!(mib(64 << 20), "64.0");
        assert_eq!(mib((64 << 20) + (52 << 10)), "64.1");
        assert_eq!(mib((1 << 20) - 1), "1.0");
    }

    #[test]
    fn the_median_is_in_the_middle_and_the_worst_the_slowest() {
        assert_eq!(median(vec![9, 1, 5]), 5);
        assert_eq!(median(Vec::new()), 0);
        assert_eq!(Times::of([9.0, 1.0, 5.0].into_iter()).for_people(), "5 (9)");
    }
}
