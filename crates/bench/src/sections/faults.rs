//! Cost of a page fault.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pagecast::server::Builder;
use pagecast_testkit::floor::{Floor, Strategy, read};
use pagecast_testkit::sim_vmm::{Connect, Job, Latency, LatencyReport, Order, Pages, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::in_process::{InProcess, own_cpu};
use super::turns::in_turn;
use super::{Bench, folder, rounds};
use crate::goal::Goal;
use crate::interrupt::Interrupt;
use crate::measure::Measure;
use crate::report::SectionReport;
use crate::samples::{Samples, Subject};
use crate::section::Section;
use crate::sim_vmm;
use crate::spread::to_f64;

/// The template: data on every page, and in the page cache.
const TEMPLATE_BYTES: u64 = 128 << 20;

/// Its pages.
const TEMPLATE_PAGES: u64 = TEMPLATE_BYTES / 4096;

pub(crate) const FLOOR: &str = "floor: bare loop";
pub(crate) const PAGECAST: &str = "pagecast";
const RIVAL: &str = "rival";
pub(crate) const RESIDENT: &str = "pagecast, resident template";

/// A server that is measured, beside the floor.
#[derive(Clone, Copy)]
struct Variant {
    name: &'static str,
    /// Whether the template is locked in memory.
    is_resident: bool,
    set_up: fn(Builder) -> Builder,
}

const VARIANTS: [Variant; 4] = [
    Variant {
        name: PAGECAST,
        is_resident: false,
        set_up: |builder| builder,
    },
    Variant {
        name: RESIDENT,
        is_resident: true,
        set_up: |builder| builder,
    },
    Variant {
        name: "pagecast, no fault-around",
        is_resident: false,
        set_up: |builder| builder.fault_around(1),
    },
    Variant {
        name: "pagecast, no polling",
        is_resident: false,
        set_up: |builder| builder.busy_poll(Duration::ZERO),
    },
];

/// The forks of a measurement, and what each does in a turn.
#[derive(Clone, Copy)]
struct Setting {
    title: &'static str,
    forks: u32,
    /// Pages that each fork touches in a turn.
    pages: u64,
    reads: Reads,
    processors: Processors,
}

/// The pages of a turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    /// In random order, spread over all of the template.
    Random,
    /// One after the other.
    InOrder,
}

/// Where forks and servers run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Processors {
    /// Where the scheduler puts them.
    Any,
    /// All on one.
    One,
    /// The forks on one, the servers on another.
    Two,
}

impl Processors {
    /// Runs `start` with the calling thread, and so all that it starts, on the processor of the forks or of the servers.
    fn run<T>(self, of_forks: bool, start: impl FnOnce() -> Result<T>) -> Result<T> {
        let all = sched_getaffinity(None)?;
        let mut ours = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu));
        let (first, second) = (ours.next(), ours.next());
        let chosen = match self {
            Self::Any => None,
            Self::Two if !of_forks => second,
            Self::One | Self::Two => first,
        };
        let Some(chosen) = chosen else { return start() };
        let mut one = CpuSet::new();
        one.set(chosen);
        sched_setaffinity(None, &one)?;
        let started = start();
        sched_setaffinity(None, &all)?;
        started
    }
}

const SETTINGS: [Setting; 6] = {
    const RANDOM: Setting = Setting {
        title: ONE_CPU,
        forks: 1,
        pages: 1024,
        reads: Reads::Random,
        processors: Processors::One,
    };
    [
        RANDOM,
        Setting {
            title: TWO_CPUS,
            processors: Processors::Two,
            ..RANDOM
        },
        Setting {
            title: "1 fork, in order, one CPU",
            pages: 4096,
            reads: Reads::InOrder,
            ..RANDOM
        },
        Setting {
            title: "1 fork, in order, two CPUs",
            pages: 4096,
            reads: Reads::InOrder,
            processors: Processors::Two,
            ..RANDOM
        },
        Setting {
            title: "4 forks",
            forks: 4,
            pages: 512,
            processors: Processors::Any,
            ..RANDOM
        },
        Setting {
            title: MANY,
            forks: 20,
            pages: 512,
            processors: Processors::Any,
            ..RANDOM
        },
    ]
};
pub(crate) const ONE_CPU: &str = "1 fork, one CPU";
pub(crate) const TWO_CPUS: &str = "1 fork, two CPUs";
pub(crate) const MANY: &str = "20 forks";

/// The forks of one of the two servers.
struct Side {
    name: &'static str,
    vmms: Vec<SimVmm>,
}

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let scale = bench.scale;
    let (sets, turns): (u32, u32) = (scale.choose(16, 3, 1), scale.choose(8, 5, 1));
    let settings = SETTINGS.map(|setting| Setting {
        pages: scale.choose(setting.pages, setting.pages, 16),
        ..setting
    });
    let model = TemplateModel::of_data(TEMPLATE_BYTES, 1);
    let files = VARIANTS.map(|_| TemplateFile::create(model.clone()));
    let files: Vec<TemplateFile> = files.into_iter().collect::<Result<_>>()?;
    let mut bytes = None;
    for file in &files {
        // Brings all of them into the page cache.
        bytes = Some(read(file.path())?);
    }
    let bytes = bytes.context("there are variants")?;
    let mut samples = Samples::default();
    let progress = rounds(Section::Faults, sets * u32::try_from(settings.len())?);
    for set in 0..sets {
        for setting in settings {
            interrupt.check()?;
            measure_set(bench, [set, turns], setting, &files, &bytes, &mut samples)?;
            progress.advance(1);
        }
    }
    let about = [
        format!(
            "Each fork touches data pages of a template of {TEMPLATE_MIB} MiB in random order, one after the other, from one \
             thread. The template is in the page cache. Each fork is a simulated VMM in a process of its own.",
            TEMPLATE_MIB = TEMPLATE_BYTES >> 20
        ),
        format!(
            "The floor has one thread a fork, which repeats a blocking read and a UFFDIO_COPY of one page from memory. \
             Firecracker's example handler does the same on demand, with more work around it. A resident template is locked in \
             memory (`pagecast template warm --resident`). Servers and forks are started anew {sets} times, and take {turns} \
             turns each time, in alternation."
        ),
    ];
    let mut report = SectionReport::new(Section::Faults, &about, samples.rows(FLOOR));
    let ratio = |title: &'static str, name, measure| {
        samples.ratio(&Subject::new(title, name), &Subject::new(title, FLOOR), measure)
    };
    for (name, of) in [(RESIDENT, ", resident template"), (PAGECAST, "")] {
        report.goal(
            format!("demand fault p50, one CPU{of}"),
            Some(FLOOR),
            Goal::AtMost(1.15),
            ratio(ONE_CPU, name, Measure::FaultP50Us),
        );
        report.goal(
            format!("demand fault p50, two CPUs{of}"),
            Some(FLOOR),
            Goal::AtMost(0.4),
            ratio(TWO_CPUS, name, Measure::FaultP50Us),
        );
        report.goal(
            format!("faults per second, 20 forks{of}"),
            Some(FLOOR),
            Goal::AtLeast(1.1),
            ratio(MANY, name, Measure::FaultsPerSecond),
        );
    }
    for setting in settings {
        let measure = if setting.forks == 1 && setting.reads == Reads::Random {
            Measure::FaultP50Us
        } else {
            Measure::FaultsPerSecond
        };
        report.warn_if_noisy(&samples, &Subject::new(setting.title, FLOOR), measure);
    }
    progress.done("measured");
    Ok(report)
}

/// New servers with new forks, which take turns.
fn measure_set(
    bench: &Bench,
    [set, turns]: [u32; 2],
    setting: Setting,
    files: &[TemplateFile],
    bytes: &Arc<[u8]>,
    samples: &mut Samples,
) -> Result<()> {
    let spawn = || {
        let spawned = || (0..setting.forks).map(|_| sim_vmm::spawn()).collect::<Result<Vec<_>>>();
        setting.processors.run(true, spawned)
    };
    let folder = folder()?;
    let floor = Side {
        name: FLOOR,
        vmms: spawn()?,
    };
    let socket = folder.path().join("floor");
    let loops = setting.processors.run(false, || {
        Floor::start_with(Strategy::Demand, &socket, bytes, floor.vmms.len())
    })?;
    let file = files.first().context("there are variants")?;
    let model = file.model();
    for vmm in &floor.vmms {
        vmm.run(Connect::new(loops.socket(), model))?;
    }
    loops.wait_until_all_have_connected();

    // Each has a lease on its own file.
    let served = VARIANTS.iter().zip(files).map(|(variant, file)| -> Result<_> {
        let mut server = setting.processors.run(false, || {
            let server = InProcess::start_with(file.path(), variant.set_up)?;
            server.find_zeros();
            Ok(server)
        })?;
        if variant.is_resident {
            server.lock_template()?;
        }
        let vmms = spawn()?;
        for (number, vmm) in vmms.iter().enumerate() {
            server.connect(number, vmm, file.model())?;
        }
        let side = Side {
            name: variant.name,
            vmms,
        };
        Ok((server, side))
    });
    let (servers, mut sides): (Vec<_>, Vec<_>) = served.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    sides.push(floor);
    let mut rivals = Vec::new();
    if let Some(rival) = &bench.rival {
        let vmms = spawn()?;
        for (number, vmm) in vmms.iter().enumerate() {
            let socket = folder.path().join(format!("rival-{number}"));
            let start = || rival.start(&socket, file.path());
            rivals.push(setting.processors.run(false, start)?);
            vmm.run(Connect::new(&socket, model))?;
        }
        sides.push(Side { name: RIVAL, vmms });
    }
    let sides: Vec<&Side> = sides.iter().collect();
    for turn in 0..turns {
        for side in in_turn(&sides, set + turn) {
            measure_turn(side, turn, setting, samples)?;
        }
    }
    servers.into_iter().try_for_each(InProcess::end)
}

fn measure_turn(side: &Side, turn: u32, setting: Setting, samples: &mut Samples) -> Result<()> {
    let subject = Subject::new(setting.title, side.name);
    samples.expect(subject.clone(), Some(setting.forks.into()));
    let turn = u64::from(turn);
    let pages = match setting.reads {
        Reads::InOrder => Pages::range(turn * setting.pages..(turn + 1) * setting.pages),
        Reads::Random => {
            let apart = u32::try_from(TEMPLATE_PAGES / setting.pages)?;
            Pages::range(turn..TEMPLATE_PAGES).every(NonZeroU32::new(apart).unwrap_or(NonZeroU32::MIN))
        }
    };
    let cpu_before = own_cpu();
    let started = Instant::now();
    let jobs = (0..).zip(&side.vmms).map(|(seed, vmm)| {
        vmm.start(Latency {
            pages: pages.clone(),
            order: match setting.reads {
                Reads::InOrder => Order::Sequential,
                Reads::Random => Order::Random(seed),
            },
        })
    });
    let jobs = jobs.collect::<Result<Vec<_>>>()?;
    let mut forks = jobs
        .into_iter()
        .map(Job::join)
        .collect::<Result<Vec<LatencyReport>>>()?;
    let elapsed = started.elapsed();
    // All but a rival run in this process, which does nothing else meanwhile.
    let cpu = own_cpu().saturating_sub(cpu_before);
    let faults = to_f64(setting.pages * u64::from(setting.forks));
    // The figures of the forks differ little; the median stands for all.
    let mut middle = |key: fn(&LatencyReport) -> u64| {
        forks.sort_unstable_by_key(key);
        micros(key(&forks[forks.len() / 2]))
    };
    samples.add(&subject, Measure::FaultP50Us, middle(|fork| fork.p50_ns));
    samples.add(&subject, Measure::FaultP99Us, middle(|fork| fork.p99_ns));
    let slowest = forks.iter().map(|fork| fork.max_ns).max().unwrap_or_default();
    samples.add(&subject, Measure::FaultMaxUs, micros(slowest));
    samples.add(&subject, Measure::FaultsPerSecond, faults / elapsed.as_secs_f64());
    if side.name != RIVAL {
        samples.add(&subject, Measure::CpuPerFaultUs, cpu.as_secs_f64() * 1e6 / faults);
    }
    Ok(())
}

fn micros(nanos: u64) -> f64 {
    to_f64(nanos) / 1000.0
}
