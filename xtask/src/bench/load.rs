//! `cargo xtask bench load`: what the server costs with very many forks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use pagecast_client::{Backend, CreateFork, ForkState};
use pagecast_testkit::process::{MemoryUse, ProcessUse};
use pagecast_testkit::sim_vmm::{Connect, Order, Pages, SimVmm, Touch};
use pagecast_testkit::template_file::{LAYOUT_PAGE, Layout, TemplateFile, TemplateModel};
use procfs::process::Process;
use serde::Serialize;

use super::goal::Goal;
use super::spread::{Spread, mib, to_f64};
use super::write_json;
use crate::cargo::build_pagecast;
use crate::daemon::{Daemon, TEMPLATE};
use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// The template of all forks.
const TEMPLATE_BYTES: u64 = 1 << 30;
/// It has data at the start of each so many pages, and holes between.
const DATA_EVERY: u64 = (1 << 20) / LAYOUT_PAGE;
/// So many pages of data there: as many rounds of load can be had.
const DATA_PAGES: u64 = 16;

/// How long forks may take to be where they are waited for.
const PATIENCE: Duration = Duration::from_mins(1);
/// How often they are looked at.
const PACE: Duration = Duration::from_millis(20);

/// CPU time is counted in ticks of 10 ms, and one of them may be somebody else's.
const IDLE_CPU_GOAL: Goal = Goal::AtMost(0.01);
/// In MiB.
const RESIDENT_GOAL: Goal = Goal::AtMost(32.0);

/// Measure what the server costs with 1,000 forks, of which 200 are served at once
///
/// A `pagecast serve` of its own, simulated VMMs (a process each, as a VMM is) with 1 GiB of memory, of which they touch
/// few pages. Resident memory, CPU time and wakeups of the server with all forks registered, idle, under load, idle again,
/// after all have ended, and once more with as many, which shows whether anything was lost.
#[derive(Debug, Args)]
pub(super) struct Load {
    /// How many forks are registered
    #[arg(long, default_value_t = 1000)]
    registered: u32,

    /// How many of them have a VMM
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    serving: u32,

    /// How many times each VMM touches a page in each MiB of its memory, all VMMs at once
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    rounds: u32,

    /// How long the server is watched while nothing happens, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    idle: u64,

    /// How many times all forks are registered, served and ended: what is given back must be used again
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,

    /// Where to write all that was measured
    #[arg(long, value_name = "FILE", default_value = "target/bench-load.json")]
    json: PathBuf,
}

#[derive(Debug, Serialize)]
struct Measured {
    registered: u32,
    serving: u32,
    stages: Vec<Stage>,
    /// Each time.
    loads: Vec<Answered>,
    /// Private memory of a simulated VMM, in bytes, before the load: the one in the middle.
    vmm_private_bytes: u64,
    /// The most that was ever resident, in bytes.
    peak_bytes: u64,
    goals: Vec<Row>,
}

/// What the server is and did in one stage of its life.
#[derive(Debug, Serialize)]
struct Stage {
    name: &'static str,
    seconds: f64,
    /// At the end.
    resident_bytes: u64,
    fds: usize,
    threads: u64,
    /// In this stage.
    cpu_s: f64,
    /// How often a thread of it slept and woke.
    wakeups: u64,
}

/// All faults of the load.
#[derive(Debug, Serialize)]
struct Answered {
    faults: u64,
    /// Of these, those that waited for the disk.
    slow: u64,
    seconds: f64,
    per_second: f64,
    /// Of the server.
    cpu_us_per_fault: f64,
    /// As the API tells it of each fork.
    p50_us: Spread,
    p99_us: Spread,
    worst_us: u64,
}

#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    measured: f64,
    goal: Goal,
    met: bool,
}

impl Load {
    /// Measures, prints tables, writes JSON; whether all goals were met.
    pub(super) fn run(&self) -> Result<bool> {
        ensure!(
            self.serving <= self.registered,
            "{} forks cannot be served of {}",
            self.serving,
            self.registered
        );
        let interrupt = Interrupt::watch()?;
        let pagecast = build_pagecast()?;
        let folder = tempfile::Builder::new()
            .prefix("pagecast-load-")
            .tempdir()
            .context("failed to create a folder for the daemon")?;
        let progress = Progress::start("writing the template");
        let template = TemplateFile::create(model())?;
        progress.done("1 GiB, sparse");
        // Those that nobody connects to are to wait for as long as this takes.
        let daemon = Daemon::start(&pagecast, folder.path(), &["--connect-deadline", "1h"])?;
        let measured = self
            .measure(&daemon, &template)
            .map_err(|error| interrupt.check().err().unwrap_or_else(|| daemon.explain(&error)))?;
        println!("{}", stages(&measured.stages));
        println!("{}", loads(&measured.loads));
        println!(
            "a simulated VMM is a process with {:.1} MiB of its own before the load",
            mib(measured.vmm_private_bytes)
        );
        println!("{}", goals(&measured.goals));
        write_json(&self.json, &measured)?;
        Ok(measured.goals.iter().all(|row| row.met))
    }

    fn measure(&self, daemon: &Daemon, template: &TemplateFile) -> Result<Measured> {
        let mut watch = Watch::of(daemon.pid())?;
        daemon.add_template(template.path())?;
        watch.end("started, with a template")?;

        let sockets = self.register(daemon)?;
        watch.end("all registered")?;
        let vmms = self.connect(daemon, &sockets, template)?;
        watch.end("some of them served")?;
        let private = vmms.iter().map(|vmm| Ok(MemoryUse::of(vmm.pid())?.private_bytes));
        let mut private = private.collect::<Result<Vec<u64>>>()?;
        private.sort_unstable();

        self.be_idle();
        watch.end("idle")?;
        let (faults, seconds) = self.load(&vmms)?;
        watch.end("under load")?;
        let mut loads = vec![self.what_the_daemon_tells(daemon, faults, seconds, watch.last_cpu_s())?];
        watch.skip()?;
        self.be_idle();
        watch.end("idle again")?;

        self.end(daemon, vmms)?;
        watch.end("all VMMs killed, all forks deleted")?;

        for _ in 1..self.times {
            let vmms = self.connect(daemon, &self.register(daemon)?, template)?;
            watch.end("all registered and served once more")?;
            let (faults, seconds) = self.load(&vmms)?;
            watch.end("under load once more")?;
            loads.push(self.what_the_daemon_tells(daemon, faults, seconds, watch.last_cpu_s())?);
            self.end(daemon, vmms)?;
            watch.end("all killed and deleted again")?;
        }

        let peak_bytes = peak_bytes(daemon.pid())?;
        let idle_cpu = |stage: &&Stage| stage.name.starts_with("idle");
        let idle_cpu = watch
            .stages
            .iter()
            .filter(idle_cpu)
            .map(|stage| stage.cpu_s)
            .fold(0.0, f64::max);
        let row = |what, measured, goal: Goal| Row {
            what,
            measured,
            goal,
            met: goal.is_met(measured),
        };
        Ok(Measured {
            registered: self.registered,
            serving: self.serving,
            loads,
            vmm_private_bytes: private.get(private.len() / 2).copied().unwrap_or_default(),
            peak_bytes,
            goals: vec![
                row("most that was resident, MiB", mib(peak_bytes), RESIDENT_GOAL),
                row("CPU while idle, s", idle_cpu, IDLE_CPU_GOAL),
            ],
            stages: watch.stages,
        })
    }

    /// Registers all; the sockets of those that get a VMM.
    fn register(&self, daemon: &Daemon) -> Result<Vec<PathBuf>> {
        let progress = Progress::start(&format!("registering {} forks", self.registered));
        let mut sockets = Vec::new();
        for number in 0..self.registered {
            let fork = CreateFork {
                id: Some(id(number)),
                backend: Some(Backend::Uffd),
                ..CreateFork::of(TEMPLATE)
            };
            let created = daemon.call(async |client| client.create_fork(&fork).await)?;
            sockets.push(created.mem_backend.backend_path);
        }
        sockets.truncate(self.serving as usize);
        progress.done("each with a socket of its own");
        Ok(sockets)
    }

    fn connect(&self, daemon: &Daemon, sockets: &[PathBuf], template: &TemplateFile) -> Result<Vec<SimVmm>> {
        let progress = Progress::start(&format!("connecting {} simulated VMMs", self.serving));
        let connect = |socket: &PathBuf| -> Result<SimVmm> {
            let vmm = SimVmm::spawn()?;
            vmm.run(Connect::new(socket, template.model()))?;
            Ok(vmm)
        };
        let vmms = sockets.iter().map(connect).collect::<Result<Vec<_>>>()?;
        await_state(daemon, ForkState::Serving, self.serving)?;
        progress.done("a process each, 1 GiB of memory each");
        Ok(vmms)
    }

    fn be_idle(&self) {
        let progress = Progress::start(&format!("leaving the server alone for {} s", self.idle));
        // Not to wait for something, but to see that nothing happens.
        std::thread::sleep(Duration::from_secs(self.idle));
        progress.done("it had nothing to do");
    }

    /// Has all VMMs touch pages at once; how many, and how long it took in seconds.
    fn load(&self, vmms: &[SimVmm]) -> Result<(u64, f64)> {
        let progress = Progress::start("touching pages in all VMMs at once");
        let started = Instant::now();
        let mut faults = 0;
        for round in 0..u64::from(self.rounds) {
            let jobs = (0..).zip(vmms).map(|(seed, vmm)| {
                vmm.start(Touch {
                    pages: Pages {
                        start: round,
                        end: None,
                        every: std::num::NonZeroU32::new(u32::try_from(DATA_EVERY)?).context("a MiB has pages")?,
                    },
                    threads: 1,
                    order: Order::Random(seed),
                })
            });
            for job in jobs.collect::<Result<Vec<_>>>()? {
                faults += job.join()?.pages;
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        progress.done(&format!("{faults} pages"));
        Ok((faults, seconds))
    }

    /// Kills all VMMs and deletes all forks.
    fn end(&self, daemon: &Daemon, vmms: Vec<SimVmm>) -> Result<()> {
        let progress = Progress::start("killing all VMMs, deleting all forks");
        drop(vmms);
        await_state(daemon, ForkState::Exited, self.serving)?;
        for number in 0..self.registered {
            daemon.call(async |client| client.remove_fork(&id(number), false).await)?;
        }
        progress.done("none is left");
        Ok(())
    }

    fn what_the_daemon_tells(&self, daemon: &Daemon, faults: u64, seconds: f64, cpu_s: f64) -> Result<Answered> {
        let forks = daemon.call(async |client| client.forks(false).await)?;
        let served: Vec<_> = forks.iter().filter(|fork| fork.state == ForkState::Serving).collect();
        ensure!(
            served.len() == self.serving as usize,
            "{} forks are served, not {}",
            served.len(),
            self.serving
        );
        let answered: u64 = served
            .iter()
            .filter_map(|fork| fork.faults)
            .map(|faults| faults.demand)
            .sum();
        ensure!(
            answered == faults,
            "the server counts {answered} faults, the VMMs touched {faults} pages"
        );
        let slow = served
            .iter()
            .filter_map(|fork| fork.faults)
            .map(|faults| faults.slow)
            .sum();
        let latencies = || served.iter().filter_map(|fork| fork.fault_latency_us);
        Ok(Answered {
            faults,
            slow,
            seconds,
            per_second: to_f64(faults) / seconds,
            cpu_us_per_fault: cpu_s * 1e6 / to_f64(faults),
            p50_us: Spread::of(latencies().map(|latency| to_f64(latency.p50))),
            p99_us: Spread::of(latencies().map(|latency| to_f64(latency.p99))),
            worst_us: latencies().map(|latency| latency.max).max().unwrap_or_default(),
        })
    }
}

/// 64 KiB of data in each MiB.
fn model() -> TemplateModel {
    let starts = (0..TEMPLATE_BYTES / LAYOUT_PAGE).step_by(usize::try_from(DATA_EVERY).expect("it is small"));
    TemplateModel {
        size: TEMPLATE_BYTES,
        seed: 1,
        layout: Layout {
            holes: starts.map(|start| start + DATA_PAGES..start + DATA_EVERY).collect(),
            ..Layout::default()
        },
    }
}

fn id(number: u32) -> String {
    format!("fork-{number}")
}

/// Waits until so many forks are in this state.
fn await_state(daemon: &Daemon, state: ForkState, count: u32) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let health = daemon.call(async |client| client.health().await)?;
        if health.forks.get(&state) == Some(&count.into()) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "not {count} forks are {state} after {PATIENCE:?}: {:?}",
            health.forks
        );
        std::thread::sleep(PACE);
    }
}

/// Looks at the server at the end of each stage.
struct Watch {
    pid: u32,
    stages: Vec<Stage>,
    started: Instant,
    cpu: Duration,
    wakeups: HashMap<i32, u64>,
}

impl Watch {
    fn of(pid: u32) -> Result<Self> {
        let mut watch = Self {
            pid,
            stages: Vec::new(),
            started: Instant::now(),
            cpu: Duration::ZERO,
            wakeups: HashMap::new(),
        };
        watch.skip()?;
        Ok(watch)
    }

    /// What was since the last stage belongs to none.
    fn skip(&mut self) -> Result<()> {
        self.cpu = ProcessUse::of(self.pid)?.cpu_time;
        self.wakeups = wakeups(self.pid)?;
        self.started = Instant::now();
        Ok(())
    }

    fn end(&mut self, name: &'static str) -> Result<()> {
        let now = ProcessUse::of(self.pid)?;
        self.stages.push(Stage {
            name,
            seconds: self.started.elapsed().as_secs_f64(),
            // Exact, which the counter in `stat` is not.
            resident_bytes: MemoryUse::of(self.pid)?.rss_bytes,
            fds: now.fds,
            threads: now.threads,
            cpu_s: now.cpu_time.saturating_sub(self.cpu).as_secs_f64(),
            wakeups: added(&self.wakeups, &wakeups(self.pid)?),
        });
        self.skip()
    }

    fn last_cpu_s(&self) -> f64 {
        self.stages.last().map_or(0.0, |stage| stage.cpu_s)
    }
}

/// How often each of its threads has slept so far.
fn wakeups(pid: u32) -> Result<HashMap<i32, u64>> {
    let mut wakeups = HashMap::new();
    for task in Process::new(pid.try_into()?)?.tasks()? {
        // One that has ended meanwhile sleeps no more.
        let Ok((tid, status)) = task.and_then(|task| Ok((task.tid, task.status()?))) else {
            continue;
        };
        wakeups.insert(tid, status.voluntary_ctxt_switches.unwrap_or_default());
    }
    Ok(wakeups)
}

/// How many wakeups there were between; one for each thread that has ended, of which no more is known.
fn added(before: &HashMap<i32, u64>, after: &HashMap<i32, u64>) -> u64 {
    let ended = before.keys().filter(|tid| !after.contains_key(tid)).count() as u64;
    let of_thread = |(tid, now): (&i32, &u64)| now.saturating_sub(before.get(tid).copied().unwrap_or_default());
    ended + after.iter().map(of_thread).sum::<u64>()
}

fn peak_bytes(pid: u32) -> Result<u64> {
    let status = Process::new(pid.try_into()?)?.status()?;
    Ok(status.vmhwm.context("the kernel does not tell the peak")? << 10)
}

fn loads(loads: &[Answered]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "load",
        "took\ns",
        "faults\na second",
        "CPU us\na fault",
        "p50 us\n(worst fork)",
        "p99 us\n(worst fork)",
        "slowest\nus",
        "from\ndisk",
    ]);
    for load in loads {
        let spread = |spread: Spread| format!("{:.0} ({:.0})", spread.median, spread.max);
        table.add_row([
            format!("{} faults", load.faults),
            format!("{:.1}", load.seconds),
            format!("{:.0}", load.per_second),
            format!("{:.1}", load.cpu_us_per_fault),
            spread(load.p50_us),
            spread(load.p99_us),
            load.worst_us.to_string(),
            load.slow.to_string(),
        ]);
    }
    right_aligned(table)
}

fn stages(stages: &[Stage]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "server",
        "resident\nMiB",
        "took\ns",
        "CPU\ns",
        "wakeups\n",
        "fds\n",
        "threads\n",
    ]);
    for stage in stages {
        table.add_row([
            stage.name.to_owned(),
            format!("{:.1}", mib(stage.resident_bytes)),
            format!("{:.1}", stage.seconds),
            format!("{:.2}", stage.cpu_s),
            stage.wakeups.to_string(),
            stage.fds.to_string(),
            stage.threads.to_string(),
        ]);
    }
    right_aligned(table)
}

/// All but the titles.
fn right_aligned(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn goals(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "measured", "goal", ""]);
    for row in rows {
        table.add_row([
            Cell::new(row.what),
            Cell::new(format!("{:.2}", row.measured)).set_alignment(CellAlignment::Right),
            Cell::new(row.goal),
            Cell::new(Goal::verdict(Some(row.met))),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_end_do_not_hide_wakeups_of_others() {
        let before = HashMap::from([(1, 1000), (2, 10)]);
        let after = HashMap::from([(2, 15), (3, 2)]);
        assert_eq!(added(&before, &after), 8);
    }
}
