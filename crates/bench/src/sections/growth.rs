//! Growth of cost with forks and templates, and the cost of idle forks.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pagecast_client::{Backend, CreateFork, ForkState};
use pagecast_testkit::sim_vmm::{Connect, Latency, Order, Pages, SimVmm, Touch};
use pagecast_testkit::template_file::{LAYOUT_PAGE, Layout, TemplateFile, TemplateModel};

use super::idle::{Seen, Watch};
use super::{Bench, folder, rounds};
use crate::daemon::{Daemon, TEMPLATE};
use crate::goal::Goal;
use crate::interrupt::Interrupt;
use crate::measure::Measure;
use crate::progress::Progress;
use crate::report::SectionReport;
use crate::samples::{Samples, Subject};
use crate::section::{Scale, Section};
use crate::sim_vmm;
use crate::spread::{Spread, mib, to_f64};

/// Memory of each fork.
const FORK_BYTES: u64 = 1 << 30;
/// Distance of its data pages, with holes between.
const DATA_EVERY: u64 = (1 << 20) / LAYOUT_PAGE;
/// Number of data pages in each.
const DATA_PAGES: u64 = 16;

/// Limit of a server's growth between repetitions. It may keep a little memory, but must not grow with time.
const GROWTH: f64 = 1.05;

/// Subjects of a server with this number of forks.
pub(crate) const FORKS: &str = "forks of 1 GiB";
const LOADED: &str = "all forks touch pages at once";
const IDLE: &str = "idle afterwards";
const WAITING: &str = "and more that wait for a VMM";
const ENDED: &str = "all forks ended";
pub(crate) const TEMPLATES: &str = "one fork";

/// The scale of this section.
struct Plan {
    /// Numbers of served forks, ascending.
    steps: &'static [u32],
    /// Number of further forks that are registered without a VMM.
    waiting: u32,
    /// Time for which an idle server is watched.
    idle: Duration,
    /// Number of repetitions with the same server.
    times: u32,
    /// Number of times that each fork touches a page in each MiB of its memory.
    loads: u64,
    /// Sizes of the templates in MiB, ascending.
    templates: &'static [u64],
    /// Number of pages touched in each of them.
    pages: u64,
    /// Number of repetitions.
    rounds: u32,
}

impl Plan {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Full => Self {
                steps: &[1, 10, 50, 100, 150, 200],
                waiting: 800,
                idle: Duration::from_secs(10),
                times: 3,
                loads: 2,
                templates: &[128, 512, 2048, 8192],
                pages: 4096,
                rounds: 7,
            },
            Scale::Quick => Self {
                steps: &[1, 50, 200],
                waiting: 0,
                idle: Duration::from_secs(2),
                times: 1,
                loads: 1,
                templates: &[128, 1024, 8192],
                pages: 2048,
                rounds: 3,
            },
            Scale::Tiny => Self {
                steps: &[1, 3],
                waiting: 1,
                idle: Duration::from_millis(100),
                times: 2,
                loads: 1,
                templates: &[16, 32],
                pages: 16,
                rounds: 1,
            },
        }
    }
}

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let plan = Plan::of(bench.scale);
    let mut samples = Samples::default();
    let many = Many::measure(bench, interrupt, &plan, &mut samples)?;
    let progress = rounds(Section::Growth, plan.rounds);
    for round in 0..plan.rounds {
        for size in plan.templates {
            interrupt.check()?;
            measure_template(bench, *size << 20, &plan, round, &mut samples)?;
        }
        progress.advance(1);
    }
    progress.done("templates of all sizes measured");

    let most = plan.steps.last().copied().unwrap_or_default();
    let about = [
        format!(
            "The forks of one `pagecast serve` are simulated VMMs with 1 GiB each, whose number grows to {most}. They then touch \
             {} pages each at once, spread over all their memory, in random order. After that they are idle for {:.0} s.{}{}",
            plan.loads * (FORK_BYTES >> 20),
            plan.idle.as_secs_f64(),
            if plan.times > 1 {
                format!(
                    " All of this is repeated {} times with the same server, which shows memory that is not freed.",
                    plan.times
                )
            } else {
                String::new()
            },
            if plan.waiting > 0 {
                format!(
                    " In the last repetition, {} more forks are registered, and wait for a VMM.",
                    plan.waiting
                )
            } else {
                String::new()
            },
        ),
        format!(
            "A second measurement has one fork of a sparse template of {} MiB to {} MiB, which touches {} pages spread over all of \
             it.",
            plan.templates.first().copied().unwrap_or_default(),
            plan.templates.last().copied().unwrap_or_default(),
            plan.pages
        ),
    ];
    let mut report = SectionReport::new(Section::Growth, &about, samples.rows(""));
    report.goal(
        format!("private memory of the server with {most} forks of 1 GiB, MiB"),
        None,
        Goal::AtMost(32.0),
        Spread::of([mib(many.most_own_bytes)]),
    );
    if let Some(grown) = many.grown() {
        report.goal(
            format!("the same with idle forks, time {} to time 1", plan.times),
            None,
            Goal::AtMost(GROWTH),
            Spread::of([grown]),
        );
    }
    report.goal(
        format!("CPU of the idle server with {most} forks, ms a second"),
        None,
        Goal::AtMost(1.0),
        Spread::of(
            many.idle_cpu_s
                .iter()
                .map(|seconds| seconds * 1e3 / plan.idle.as_secs_f64()),
        ),
    );
    Ok(report)
}

/// Observations of a server with many forks.
struct Many {
    /// The most private memory at any look.
    most_own_bytes: u64,
    /// At each repetition, when idle.
    idle_cpu_s: Vec<f64>,
    /// At each repetition, when idle.
    idle_own_bytes: Vec<u64>,
}

impl Many {
    /// Growth of the server from the first repetition to the last, if there are several.
    fn grown(&self) -> Option<f64> {
        match self.idle_own_bytes[..] {
            [first, .., last] => Some(to_f64(last) / to_f64(first)),
            _ => None,
        }
    }

    fn measure(bench: &Bench, interrupt: &Interrupt, plan: &Plan, samples: &mut Samples) -> Result<Self> {
        let progress = Progress::start("growth: writing a template");
        let template = TemplateFile::create(many_model())?;
        progress.done("1 GiB, sparse");
        let folder = folder()?;
        // Forks without a VMM must wait for the whole section.
        let daemon = Daemon::start(&bench.pagecast, folder.path(), &["--connect-deadline", "1h"])?;
        daemon.add_template(template.path())?;
        let mut many = Self {
            most_own_bytes: 0,
            idle_cpu_s: Vec::new(),
            idle_own_bytes: Vec::new(),
        };
        let most = plan.steps.last().copied().unwrap_or_default();
        let progress = Progress::of("growth: forks", "forks", u64::from(most * plan.times));
        for time in 0..plan.times {
            let all = Time {
                interrupt,
                plan,
                template: &template,
                daemon: &daemon,
                progress: &progress,
                number: time,
            };
            all.measure(&mut many, samples)
                .map_err(|error| daemon.explain(&error))?;
        }
        progress.done("measured");
        Ok(many)
    }
}

/// One repetition: all forks are started, loaded, left alone and ended.
struct Time<'a> {
    interrupt: &'a Interrupt,
    plan: &'a Plan,
    template: &'a TemplateFile,
    daemon: &'a Daemon,
    progress: &'a Progress,
    /// Number of the repetition, from 0.
    number: u32,
}

impl Time<'_> {
    fn measure(&self, many: &mut Many, samples: &mut Samples) -> Result<()> {
        let plan = self.plan;
        let mut watch = Watch::of(self.daemon.pid())?;
        let mut vmms: Vec<SimVmm> = Vec::new();
        for step in plan.steps {
            let added = *step - u32::try_from(vmms.len())?;
            watch.end()?;
            while vmms.len() < *step as usize {
                self.interrupt.check()?;
                vmms.push(self.start(vmms.len())?);
                self.progress.advance(1);
            }
            self.daemon.await_state(ForkState::Serving, *step)?;
            let seen = watch.end()?;
            let subject = Subject::new(step.to_string(), FORKS);
            samples.expect(subject.clone(), Some((*step).into()));
            samples.add(
                &subject,
                Measure::StartMs,
                seen.elapsed.as_secs_f64() * 1e3 / f64::from(added),
            );
            add(samples, &subject, &seen);
        }
        let most = vmms.len();
        let loaded = Subject::new(self.title(most), LOADED);
        let started = Instant::now();
        let faults = self.load(&vmms)?;
        let elapsed = started.elapsed();
        let seen = watch.end()?;
        samples.add(
            &loaded,
            Measure::FaultsPerSecond,
            to_f64(faults) / elapsed.as_secs_f64(),
        );
        samples.add(
            &loaded,
            Measure::CpuPerFaultUs,
            seen.cpu.as_secs_f64() * 1e6 / to_f64(faults),
        );
        add(samples, &loaded, &seen);

        // Sleeps to watch that nothing happens.
        std::thread::sleep(plan.idle);
        let idle = watch.end()?;
        add(samples, &Subject::new(self.title(most), IDLE), &idle);
        many.idle_cpu_s.push(idle.cpu.as_secs_f64());
        // Before more forks wait beside these, in the last repetition.
        many.idle_own_bytes.push(idle.own_bytes);
        many.most_own_bytes = many.most_own_bytes.max(seen.own_bytes).max(idle.own_bytes);

        let waiting = self.wait_beside(most, &mut watch, samples)?;
        let ids: Vec<String> = (0..most).map(|number| self.id(number)).chain(waiting).collect();
        drop(vmms);
        self.daemon.await_state(ForkState::Exited, u32::try_from(most)?)?;
        for id in &ids {
            self.daemon.call(async |client| client.remove_fork(id, false).await)?;
        }
        let seen = watch.end()?;
        add(samples, &Subject::new(self.title(0), ENDED), &seen);
        Ok(())
    }

    /// In the last repetition, registers many more forks, for which no VMM comes. Returns their IDs.
    fn wait_beside(&self, served: usize, watch: &mut Watch, samples: &mut Samples) -> Result<Vec<String>> {
        if self.number + 1 < self.plan.times || self.plan.waiting == 0 {
            return Ok(Vec::new());
        }
        let ids: Vec<String> = (0..self.plan.waiting)
            .map(|number| format!("waiting-{number}"))
            .collect();
        watch.end()?;
        for id in &ids {
            self.interrupt.check()?;
            self.create(id)?;
        }
        let seen = watch.end()?;
        add(
            samples,
            &Subject::new(format!("{served} + {}", ids.len()), WAITING),
            &seen,
        );
        Ok(ids)
    }

    /// The setting: number of forks and repetition.
    fn title(&self, forks: usize) -> String {
        match self.plan.times {
            1 => forks.to_string(),
            _ => format!("{forks}, time {}", self.number + 1),
        }
    }

    fn id(&self, number: usize) -> String {
        format!("fork-{}-{number}", self.number)
    }

    fn create(&self, id: &str) -> Result<std::path::PathBuf> {
        let wanted = CreateFork {
            id: Some(id.to_owned()),
            backend: Some(Backend::Uffd),
            ..CreateFork::of(TEMPLATE)
        };
        let created = self.daemon.call(async |client| client.create_fork(&wanted).await)?;
        Ok(created.mem_backend.backend_path)
    }

    fn start(&self, number: usize) -> Result<SimVmm> {
        let socket = self.create(&self.id(number))?;
        let vmm = sim_vmm::spawn()?;
        vmm.run(Connect::new(socket, self.template.model()))?;
        Ok(vmm)
    }

    /// Has all VMMs touch pages at once. Returns the number of pages.
    fn load(&self, vmms: &[SimVmm]) -> Result<u64> {
        let every = NonZeroU32::new(u32::try_from(DATA_EVERY)?).context("a MiB has pages")?;
        let mut faults = 0;
        for load in 0..self.plan.loads {
            let jobs = (0..).zip(vmms).map(|(seed, vmm)| {
                vmm.start(Touch {
                    pages: Pages {
                        start: load,
                        end: None,
                        every,
                    },
                    threads: 1,
                    order: Order::Random(seed),
                })
            });
            for job in jobs.collect::<Result<Vec<_>>>()? {
                faults += job.join()?.pages;
            }
        }
        Ok(faults)
    }
}

fn add(samples: &mut Samples, subject: &Subject, seen: &Seen) {
    for (measure, value) in [
        (Measure::ServerMib, mib(seen.resident_bytes)),
        (Measure::ServerOwnMib, mib(seen.own_bytes)),
        (Measure::ServerCpuSeconds, seen.cpu.as_secs_f64()),
        (Measure::Wakeups, to_f64(seen.wakeups)),
        (Measure::Fds, to_f64(seen.fds as u64)),
        (Measure::Threads, to_f64(seen.threads)),
    ] {
        samples.add(subject, measure, value);
    }
}

/// 64 KiB of data in each MiB.
fn many_model() -> TemplateModel {
    let mut holes = Vec::new();
    let mut start = 0;
    while start < FORK_BYTES / LAYOUT_PAGE {
        holes.push(start + DATA_PAGES..start + DATA_EVERY);
        start += DATA_EVERY;
    }
    TemplateModel {
        size: FORK_BYTES,
        seed: 1,
        layout: Layout {
            holes,
            ..Layout::default()
        },
    }
}

/// One fork of a template of this size, which has data on as many pages as are touched, evenly spread.
fn measure_template(bench: &Bench, size: u64, plan: &Plan, round: u32, samples: &mut Samples) -> Result<()> {
    let every = size / LAYOUT_PAGE / plan.pages;
    let holes = (0..plan.pages).map(|page| page * every + 1..(page + 1) * every);
    let model = TemplateModel {
        size,
        seed: 1,
        layout: Layout {
            holes: holes.collect(),
            ..Layout::default()
        },
    };
    let template = TemplateFile::create(model)?;
    let folder = folder()?;
    let daemon = Daemon::start(&bench.pagecast, folder.path(), &[])?;
    let started = Instant::now();
    daemon.add_template(template.path())?;
    let added_in = started.elapsed();

    let vmm = sim_vmm::spawn()?;
    let wanted = CreateFork {
        backend: Some(Backend::Uffd),
        ..CreateFork::of(TEMPLATE)
    };
    let started = Instant::now();
    let created = daemon.call(async |client| client.create_fork(&wanted).await)?;
    // The model is as large as the template, and is not checked here.
    let connect = Connect::new(created.mem_backend.backend_path, &TemplateModel::of_data(size, 1));
    vmm.run(connect)?;
    daemon.await_state(ForkState::Serving, 1)?;
    let started_in = started.elapsed();
    let mut watch = Watch::of(daemon.pid())?;
    let latency = vmm.run(Latency {
        pages: Pages {
            start: 0,
            end: None,
            every: NonZeroU32::new(u32::try_from(every)?).context("more is touched than there is")?,
        },
        order: Order::Random(round.into()),
    })?;
    let seen = watch.end()?;
    let subject = Subject::new(size_title(size), TEMPLATES);
    samples.expect(subject.clone(), Some(size));
    for (measure, value) in [
        (Measure::AddTemplateMs, added_in.as_secs_f64() * 1e3),
        (Measure::StartMs, started_in.as_secs_f64() * 1e3),
        (Measure::FaultP50Us, to_f64(latency.p50_ns) / 1e3),
        (Measure::FaultP99Us, to_f64(latency.p99_ns) / 1e3),
        (
            Measure::CpuPerFaultUs,
            seen.cpu.as_secs_f64() * 1e6 / to_f64(latency.count),
        ),
        (Measure::ServerMib, mib(seen.resident_bytes)),
        (Measure::ServerOwnMib, mib(seen.own_bytes)),
    ] {
        samples.add(&subject, measure, value);
    }
    Ok(())
}

fn size_title(bytes: u64) -> String {
    match bytes >> 20 {
        gib if gib.is_multiple_of(1024) => format!("{} GiB template", gib / 1024),
        mib => format!("{mib} MiB template"),
    }
}
