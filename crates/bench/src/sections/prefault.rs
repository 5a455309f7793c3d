//! Speed of prefault.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pagecast::server::{Fork, Prefault};
use pagecast_testkit::floor::{BulkCopy, read};
use pagecast_testkit::sim_vmm::{Connect, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use super::in_process::{InProcess, own_cpu};
use super::turns::in_turn;
use super::{Bench, PATIENCE, folder, rounds};
use crate::goal::Goal;
use crate::interrupt::Interrupt;
use crate::measure::Measure;
use crate::report::SectionReport;
use crate::samples::{Samples, Subject};
use crate::section::Section;
use crate::sim_vmm;
use crate::spread::to_f64;

pub(crate) const FLOOR: &str = "floor: one thread of bulk UFFDIO_COPY";
pub(crate) const PAGECAST: &str = "pagecast, prefault of all";
/// Bytes that the floor copies with one call: more is no faster.
const CHUNK: usize = 2 << 20;
/// Time between two looks at the progress.
const PACE: Duration = Duration::from_micros(200);

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let scale = bench.scale;
    let (count, mib): (u32, u64) = (scale.choose(25, 9, 1), scale.choose(512, 256, 8));
    let file = TemplateFile::create(TemplateModel::of_data(mib << 20, 1))?;
    let bytes = read(file.path())?;
    let server = InProcess::start(file.path())?;
    // As a daemon does in the background.
    server.find_zeros();
    let mut samples = Samples::default();
    let progress = rounds(Section::Prefault, count);
    for round in 0..count {
        for system in in_turn(&[FLOOR, PAGECAST], round) {
            interrupt.check()?;
            let vmm = sim_vmm::spawn()?;
            let folder = folder()?;
            let cpu_before;
            let started;
            if system == FLOOR {
                let socket = folder.path().join("socket");
                let copy = BulkCopy::start(&socket, &bytes, CHUNK)?;
                (cpu_before, started) = (own_cpu(), Instant::now());
                connect(&vmm, &socket, &file)?;
                copy.join()?;
            } else {
                let fork = server.register(round as usize, |options| options.prefault(Prefault::All))?;
                (cpu_before, started) = (own_cpu(), Instant::now());
                connect(&vmm, fork.socket_path(), &file)?;
                wait_until_installed(&fork, file.model().size)?;
            }
            let seconds = started.elapsed().as_secs_f64();
            let cpu = own_cpu().saturating_sub(cpu_before).as_secs_f64();
            let subject = Subject::new("", system);
            let gib = to_f64(file.model().size) / f64::from(1 << 30);
            samples.add(&subject, Measure::GibPerSecond, gib / seconds);
            samples.add(&subject, Measure::ProcessorsUsed, cpu / seconds);
        }
        samples.next_round();
        progress.advance(1);
    }
    progress.done("measured");
    server.end()?;

    let about = [format!(
        "A whole template of {mib} MiB of data, which is in the page cache, is installed in a fork whose guest does nothing. The \
         time runs from before its VMM connects until the last page is installed. The floor copies from memory, {} MiB a call.",
        CHUNK >> 20
    )];
    let mut report = SectionReport::new(Section::Prefault, &about, samples.rows(FLOOR));
    let (ours, floor) = (Subject::new("", PAGECAST), Subject::new("", FLOOR));
    let ratio = samples.ratio(&ours, &floor, Measure::GibPerSecond);
    report.goal(
        "bulk prefault, bytes a second",
        Some("one thread of bulk UFFDIO_COPY"),
        Goal::AtLeast(0.9),
        ratio,
    );
    if std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1) {
        report.goal(
            "bulk prefault with two cores free",
            Some("one thread of bulk UFFDIO_COPY"),
            Goal::AtLeast(1.0),
            ratio,
        );
    }
    report.warn_if_noisy(&samples, &floor, Measure::GibPerSecond);
    Ok(report)
}

fn connect(vmm: &SimVmm, socket: &std::path::Path, file: &TemplateFile) -> Result<()> {
    vmm.run(Connect::new(socket, file.model()))?;
    Ok(())
}

fn wait_until_installed(fork: &Fork, bytes: u64) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = fork.status();
        if status.stats.installed_bytes >= bytes {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline && !status.state.is_end(),
            "not all is installed: {status:?}"
        );
        std::thread::sleep(PACE);
    }
}
