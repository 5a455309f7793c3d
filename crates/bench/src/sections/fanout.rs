//! Many forks at once, in real Firecrackers if there is KVM.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pagecast_client::fork::Prefault;
use pagecast_client::{Backend, CreateFork};
use pagecast_testkit::process::{MemoryUse, ProcessUse};

use super::turns::in_turn;
use super::{Bench, folder, rounds};
use crate::daemon::{Daemon, TEMPLATE};
use crate::fleet::{Kind, Size, Template, Vmm, WRITE_EVERY, at_once, create_template, tag};
use crate::goal::Goal;
use crate::interrupt::Interrupt;
use crate::measure::Measure;
use crate::report::SectionReport;
use crate::samples::{Samples, Subject};
use crate::section::Section;
use crate::spread::{mib, quantile, to_f64};

const FILE: &str = "file";

/// A backend, its prefault, and their name.
#[derive(Clone, Copy)]
struct System {
    name: &'static str,
    backend: Backend,
    prefault: Option<Prefault>,
}

const SYSTEMS: [System; 3] = [
    System {
        name: FILE,
        backend: Backend::File,
        prefault: None,
    },
    System {
        name: "uffd, prefault",
        backend: Backend::Uffd,
        prefault: Some(Prefault::WorkingSet),
    },
    System {
        name: "uffd, on demand",
        backend: Backend::Uffd,
        prefault: Some(Prefault::None),
    },
];

/// A fork that has read its working set.
struct Ready {
    vmm: Box<dyn Vmm>,
    resumed: Duration,
    /// Time from the start of the restore until it had read its working set.
    read: Duration,
}

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let scale = bench.scale;
    let count: u32 = scale.choose(6, 1, 1);
    let size = scale.choose((128, 64), (128, 32), (128, 1));
    let size = Size {
        mem_mib: size.0,
        data_mib: size.1,
    };
    let forks: &[u32] = scale.choose(&[1, 5, 20], &[1, 5, 20], &[2]);
    let kind = Kind::here()?;
    let folder = folder()?;
    let template = create_template(&kind, folder.path(), size)?;
    learn(bench, &*template)?;
    let mut samples = Samples::default();
    let progress = rounds(Section::Fanout, count * u32::try_from(forks.len())?);
    for round in 0..count {
        for forks in forks {
            for system in in_turn(&SYSTEMS, round) {
                interrupt.check()?;
                measure_forks(bench, &*template, size, *forks, system, &mut samples)?;
            }
            progress.advance(1);
        }
    }
    progress.done("measured");

    let about = [
        format!(
            "The forks are {kind} with {} MiB each, restored at once. Each fork reads one word of each page of its working set of \
             {} MiB. It is ready then, and the time runs from the start of the restore. Each fork then writes to 1 of \
             {WRITE_EVERY} pages of its working set, and memory is measured. There are {count} rounds, each with a new \
             `pagecast serve`. The working set of `prefault` was recorded from another fork.",
            size.mem_mib, size.data_mib
        ),
        "The least that the forks could cost together is one working set, the pages that all of them wrote, and the same VMMs \
         without a guest, measured just before."
            .to_owned(),
    ];
    let mut report = SectionReport::new(Section::Fanout, &about, samples.rows(""));
    if let Kind::Simulated(why) = &kind {
        report.warnings.push(format!(
            "no real Firecracker was measured, because VMMs were simulated: {why}"
        ));
    }
    if let Some(most) = forks.iter().max().filter(|most| **most >= 20) {
        let subject = Subject::new(title(*most), FILE);
        report.goal(
            format!("memory of {most} forks, `file`"),
            Some("the least that they could cost"),
            Goal::AtMost(1.1),
            samples.spread(&subject, Measure::PssToLeast),
        );
    }
    Ok(report)
}

/// Records one fork with a daemon of its own.
fn learn(bench: &Bench, template: &dyn Template) -> Result<()> {
    let folder = folder()?;
    let daemon = Daemon::start(&bench.pagecast, folder.path(), &[])?;
    daemon.add_template(template.mem_file())?;
    daemon.learn(template)
}

fn title(forks: u32) -> String {
    if forks == 1 {
        "1 fork".to_owned()
    } else {
        format!("{forks} forks")
    }
}

fn measure_forks(
    bench: &Bench,
    template: &dyn Template,
    size: Size,
    forks: u32,
    system: System,
    samples: &mut Samples,
) -> Result<()> {
    let folder = folder()?;
    let daemon = Daemon::start(&bench.pagecast, folder.path(), &[])?;
    let measured = play(&daemon, template, size, forks, system, samples);
    measured.map_err(|error| daemon.explain(&error))
}

fn play(
    daemon: &Daemon,
    template: &dyn Template,
    size: Size,
    forks: u32,
    system: System,
    samples: &mut Samples,
) -> Result<()> {
    daemon.add_template(template.mem_file())?;
    let vmms = at_once((0..forks).collect(), |_| template.start())?;
    let blank = memory_of(vmms.iter().map(|vmm| vmm.pid()))?;
    let before = ProcessUse::of(daemon.pid())?.cpu_time;
    // All are created before the first is restored, so that none starts earlier.
    let mut ids = Vec::new();
    let created = (1..).zip(vmms).map(|(number, vmm)| {
        let wanted = CreateFork {
            backend: Some(system.backend),
            prefault: system.prefault,
            pid: Some(vmm.pid().try_into()?),
            ..CreateFork::of(TEMPLATE)
        };
        let created = daemon.call(async |client| client.create_fork(&wanted).await)?;
        ids.push(created.id);
        Ok((number, vmm, created.mem_backend))
    });
    let created = created.collect::<Result<Vec<_>>>()?;
    let mut ready = at_once(created, |(number, vmm, memory)| {
        let started = Instant::now();
        let (mut vmm, resumed) = vmm.restore(tag(number), &memory)?;
        let touched = vmm.touch(template.working_set());
        touched.with_context(|| format!("fork {number} failed to read its working set"))?;
        Ok(Ready {
            vmm,
            resumed,
            read: started.elapsed(),
        })
    })?;
    let mut faults = Vec::new();
    for id in &ids {
        let fork = daemon.call(async |client| client.fork(id).await)?;
        faults.push(to_f64(fork.faults.map_or(0, |faults| faults.demand)));
    }
    faults.sort_unstable_by(f64::total_cmp);
    at_once(ready.iter_mut().collect(), |fork| {
        fork.vmm.write(template.working_set())
    })?;
    let memory = memory_of(ready.iter().map(|fork| fork.vmm.pid()))?;
    let server = ProcessUse::of(daemon.pid())?;
    let server_bytes = MemoryUse::of(daemon.pid())?.rss_bytes;

    let subject = Subject::new(title(forks), system.name);
    samples.expect(subject.clone(), Some(forks.into()));
    let sorted = |of: fn(&Ready) -> Duration| {
        let mut times: Vec<f64> = ready.iter().map(|fork| of(fork).as_secs_f64() * 1e3).collect();
        times.sort_unstable_by(f64::total_cmp);
        times
    };
    let (resumed, read) = (sorted(|fork| fork.resumed), sorted(|fork| fork.read));
    let mut private: Vec<f64> = memory.iter().map(|memory| mib(memory.private_bytes)).collect();
    private.sort_unstable_by(f64::total_cmp);
    let pss_of = |vmms: &[MemoryUse]| vmms.iter().map(|vmm| vmm.pss_bytes).sum::<u64>();
    let working_set = u64::from(size.data_mib) << 20;
    let written = u64::from(forks) * working_set / u64::from(WRITE_EVERY);
    let least = working_set + written + pss_of(&blank);
    let pss = pss_of(&memory);
    for (measure, value) in [
        (Measure::ResumedMs, quantile(&resumed, 0.5)),
        (Measure::ReadyMs, quantile(&read, 0.5)),
        (Measure::ReadyP99Ms, quantile(&read, 0.99)),
        (Measure::DemandFaults, quantile(&faults, 0.5)),
        (Measure::PrivateMib, quantile(&private, 0.5)),
        (Measure::PrivateSumMib, private.iter().sum()),
        (Measure::PssMib, mib(pss)),
        (Measure::PssToLeast, to_f64(pss) / to_f64(least)),
        (
            Measure::ServerCpuSeconds,
            server.cpu_time.saturating_sub(before).as_secs_f64(),
        ),
        (Measure::ServerMib, mib(server_bytes)),
        (Measure::ServerOwnMib, mib(server.own_bytes)),
    ] {
        samples.add(&subject, measure, value);
    }
    Ok(())
}

fn memory_of(pids: impl Iterator<Item = u32>) -> Result<Vec<MemoryUse>> {
    pids.map(MemoryUse::of).collect()
}
