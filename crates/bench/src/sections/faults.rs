//! Cost of a page fault.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use pagecast_testkit::floor::{Floor, Strategy, read};
use pagecast_testkit::sim_vmm::{Connect, Job, Latency, LatencyReport, Order, Pages, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

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
const TEMPLATE_BYTES: u64 = 64 << 20;
pub(crate) const FLOOR: &str = "floor: bare loop";
pub(crate) const PAGECAST: &str = "pagecast";
pub(crate) const RESIDENT: &str = "pagecast, resident template";

/// Number of forks at once, and of pages that each touches a turn.
#[derive(Clone, Copy)]
struct Setting {
    forks: u32,
    pages: u64,
}

impl Setting {
    fn title(self) -> String {
        match self.forks {
            1 => "1 fork".to_owned(),
            forks => format!("{forks} forks"),
        }
    }
}

/// The forks of one of the two servers.
struct Side {
    name: &'static str,
    vmms: Vec<SimVmm>,
}

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let scale = bench.scale;
    let (sets, turns): (u32, u32) = (scale.choose(16, 3, 1), scale.choose(8, 5, 1));
    let setting = |forks, pages| Setting {
        forks,
        pages: scale.choose(pages, pages, 16),
    };
    let settings = [setting(1, 1024), setting(4, 512), setting(20, 512)];
    let model = TemplateModel::of_data(TEMPLATE_BYTES, 1);
    let files = [TemplateFile::create(model.clone())?, TemplateFile::create(model)?];
    let [bytes, _] = [read(files[0].path())?, read(files[1].path())?];
    let mut samples = Samples::default();
    let progress = rounds(Section::Faults, sets * 3);
    for set in 0..sets {
        for setting in settings {
            interrupt.check()?;
            measure_set(set, turns, setting, &files, &bytes, &mut samples)?;
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
    for setting in settings {
        let floor = Subject::new(setting.title(), FLOOR);
        let ratio = |name, measure| samples.ratio(&Subject::new(setting.title(), name), &floor, measure);
        for (name, of) in [(RESIDENT, ", resident template"), (PAGECAST, "")] {
            match setting.forks {
                1 => report.goal(
                    format!("demand fault p50, 1 fork{of}"),
                    Some(FLOOR),
                    Goal::AtMost(1.15),
                    ratio(name, Measure::FaultP50Us),
                ),
                20 => report.goal(
                    format!("faults per second, 20 forks{of}"),
                    Some(FLOOR),
                    Goal::AtLeast(0.95),
                    ratio(name, Measure::FaultsPerSecond),
                ),
                _ => {}
            }
        }
        let measure = if setting.forks == 1 {
            Measure::FaultP50Us
        } else {
            Measure::FaultsPerSecond
        };
        report.warn_if_noisy(&samples, &floor, measure);
    }
    progress.done("measured");
    Ok(report)
}

/// New servers with new forks, which take turns.
fn measure_set(
    set: u32,
    turns: u32,
    setting: Setting,
    files: &[TemplateFile; 2],
    bytes: &Arc<[u8]>,
    samples: &mut Samples,
) -> Result<()> {
    let spawn = || (0..setting.forks).map(|_| sim_vmm::spawn()).collect::<Result<Vec<_>>>();
    // Each has a lease on its own file.
    let [file, resident_file] = files;
    let folder = folder()?;
    let floor = Side {
        name: FLOOR,
        vmms: spawn()?,
    };
    let loops = Floor::start_with(Strategy::Demand, &folder.path().join("floor"), bytes, floor.vmms.len())?;
    for vmm in &floor.vmms {
        vmm.run(Connect::new(loops.socket(), file.model()))?;
    }
    loops.wait_until_all_have_connected();

    let serve = |name, file: &TemplateFile, resident| -> Result<(InProcess, Side)> {
        let mut server = InProcess::start(file.path())?;
        server.find_zeros();
        if resident {
            server.lock_template()?;
        }
        let vmms = spawn()?;
        for (number, vmm) in vmms.iter().enumerate() {
            server.connect(number, vmm, file.model())?;
        }
        Ok((server, Side { name, vmms }))
    };
    let (plain_server, plain) = serve(PAGECAST, file, false)?;
    let (resident_server, resident) = serve(RESIDENT, resident_file, true)?;
    for turn in 0..turns {
        for side in in_turn(&[&floor, &plain, &resident], set + turn) {
            measure_turn(side, turn, setting, samples)?;
        }
    }
    plain_server.end()?;
    resident_server.end()
}

fn measure_turn(side: &Side, turn: u32, setting: Setting, samples: &mut Samples) -> Result<()> {
    let subject = Subject::new(setting.title(), side.name);
    samples.expect(subject.clone(), Some(setting.forks.into()));
    let first = u64::from(turn) * setting.pages;
    let cpu_before = own_cpu();
    let started = Instant::now();
    let jobs = (0..).zip(&side.vmms).map(|(seed, vmm)| {
        vmm.start(Latency {
            pages: Pages::range(first..first + setting.pages),
            order: Order::Random(seed),
        })
    });
    let jobs = jobs.collect::<Result<Vec<_>>>()?;
    let mut forks = jobs
        .into_iter()
        .map(Job::join)
        .collect::<Result<Vec<LatencyReport>>>()?;
    let elapsed = started.elapsed();
    // Floor and server run in this process, which does nothing else meanwhile.
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
    samples.add(&subject, Measure::CpuPerFaultUs, cpu.as_secs_f64() * 1e6 / faults);
    Ok(())
}

fn micros(nanos: u64) -> f64 {
    to_f64(nanos) / 1000.0
}
