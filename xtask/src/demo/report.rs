//! The result of the demo, for people and for machines.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Color, Table, presets};
use pagecast_testkit::firecracker::Kvm;
use serde::Serialize;

use super::scenario::{Played, PlayedFork};
use super::vmm::MEM_MIB;

/// What came of it all.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Why VMMs were simulated; none where Firecracker ran.
    simulated_because: Option<String>,
    forks: Vec<ForkReport>,
    totals: Totals,
}

#[derive(Debug, Serialize)]
struct ForkReport {
    fork: u32,
    pid: u32,
    /// Load and resume.
    resumed_ms: f64,
    /// From the start of the load to the end of the first check of all memory.
    all_read_ms: f64,
    demand_faults: u64,
    installed_bytes: u64,
    /// Words, or pages where VMMs are simulated.
    mismatches: u64,
    first_mismatch: Option<String>,
    pss_bytes: u64,
    private_bytes: u64,
    shared_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Totals {
    forks: usize,
    mismatches: u64,
    guest_bytes: u64,
    pss_bytes: u64,
    private_bytes: u64,
    demand_faults: u64,
    /// The median of the forks' medians.
    fault_p50_us: u64,
    /// The worst of the forks' 99th percentiles.
    fault_p99_us: u64,
    server_rss_bytes: u64,
    server_cpu_s: f64,
    /// From the start of the server to the last check.
    wall_s: f64,
}

impl Report {
    /// `wall` is from the start of the server to the end.
    pub(super) fn new(kvm: &Kvm, played: &Played, wall: Duration) -> Self {
        let forks: Vec<_> = played.forks.iter().map(ForkReport::new).collect();
        let sum = |of: fn(&ForkReport) -> u64| forks.iter().map(of).sum();
        let latencies = || played.forks.iter().map(|fork| &fork.session.fault_latency_us);
        let totals = Totals {
            forks: forks.len(),
            mismatches: sum(|fork| fork.mismatches),
            guest_bytes: forks.len() as u64 * (u64::from(MEM_MIB) << 20),
            pss_bytes: sum(|fork| fork.pss_bytes),
            private_bytes: sum(|fork| fork.private_bytes),
            demand_faults: sum(|fork| fork.demand_faults),
            fault_p50_us: median(latencies().map(|latency| latency.p50).collect()),
            fault_p99_us: latencies().map(|latency| latency.p99).max().unwrap_or_default(),
            server_rss_bytes: played.server.rss_bytes,
            server_cpu_s: played.server.cpu_time.as_secs_f64(),
            wall_s: wall.as_secs_f64(),
        };
        let simulated_because = match kvm {
            Kvm::Usable => None,
            Kvm::Missing(why) => Some(why.clone()),
        };
        Self {
            simulated_because,
            forks,
            totals,
        }
    }

    pub(super) fn mismatches(&self) -> u64 {
        self.totals.mismatches
    }

    /// On stdout, where nothing else is said.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        let text = if json {
            serde_json::to_string_pretty(self).context("failed to write JSON")? + "\n"
        } else {
            self.for_people()
        };
        match std::io::stdout().write_all(text.as_bytes()) {
            // Whoever reads it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            written => written.context("failed to write the result"),
        }
    }

    fn for_people(&self) -> String {
        let mut text = format!("\n{}\n\n", self.table());
        for fork in &self.forks {
            if let Some(first) = &fork.first_mismatch {
                let _ = writeln!(text, "fork {}: first mismatch at {first}", fork.fork);
            }
        }
        text + &self.totals_for_people()
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        if !console::colors_enabled() {
            table.force_no_tty();
        }
        table.set_header([
            "fork",
            "resumed\nms",
            "all read\nms",
            "demand\nfaults",
            "mismatches\n",
            "private\nMiB",
            "shared\nMiB",
        ]);
        for fork in &self.forks {
            let colour = if fork.mismatches == 0 { Color::Green } else { Color::Red };
            table.add_row([
                Cell::new(fork.fork),
                Cell::new(format!("{:.0}", fork.resumed_ms)),
                Cell::new(format!("{:.0}", fork.all_read_ms)),
                Cell::new(fork.demand_faults),
                Cell::new(fork.mismatches).fg(colour),
                Cell::new(mib(fork.private_bytes)),
                Cell::new(mib(fork.shared_bytes)),
            ]);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    fn totals_for_people(&self) -> String {
        let Totals {
            forks,
            mismatches,
            guest_bytes,
            pss_bytes,
            private_bytes,
            demand_faults,
            fault_p50_us,
            fault_p99_us,
            server_rss_bytes,
            server_cpu_s,
            wall_s,
        } = &self.totals;
        let vmms = match &self.simulated_because {
            None => "Firecracker microVMs".to_owned(),
            Some(why) => format!("simulated VMMs ({why})"),
        };
        format!(
            "{forks} {vmms} of {MEM_MIB} MiB, forked from one template
memory      {} MiB PSS, {} MiB private, of {} MiB that the guests have
faults      {demand_faults}; p50 {fault_p50_us} us (median of the forks), p99 {fault_p99_us} us (worst fork)
server      {} MiB resident, {server_cpu_s:.1} s of CPU time
wall time   {wall_s:.1} s
mismatches  {mismatches}, in three checks of all memory: after the restore, after writing, after the server had gone
",
            mib(*pss_bytes),
            mib(*private_bytes),
            mib(*guest_bytes),
            mib(*server_rss_bytes),
        )
    }
}

impl ForkReport {
    fn new(fork: &PlayedFork) -> Self {
        Self {
            fork: fork.number,
            pid: fork.pid,
            resumed_ms: milliseconds(fork.resumed_in),
            all_read_ms: milliseconds(fork.all_read_in),
            demand_faults: fork.session.faults.demand,
            installed_bytes: fork.session.installed_bytes,
            mismatches: fork.mismatches.count,
            first_mismatch: fork.mismatches.first.clone(),
            pss_bytes: fork.memory.pss_bytes,
            private_bytes: fork.memory.private_bytes,
            shared_bytes: fork.memory.shared_bytes,
        }
    }
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// To one digit after the point.
fn mib(bytes: u64) -> String {
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
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9, 1, 5]), 5);
        assert_eq!(median(Vec::new()), 0);
    }
}
