//! Cost of a page of zeros.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pagecast::server::Fork;
use pagecast_testkit::floor::{Floor, Strategy, read};
use pagecast_testkit::sim_vmm::{Connect, MapAnonymous, SimVmm, Visit, Visited};
use pagecast_testkit::template_file::{LAYOUT_PAGE, Layout, TemplateFile, TemplateModel};

use super::in_process::InProcess;
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

/// Number of data pages at the start of the template; the rest are zeros.
const DATA_PAGES: u64 = 256;

/// Time between two looks for zeros that were given back.
const PACE: Duration = Duration::from_millis(1);

/// The settings: the first access to fresh memory.
pub(crate) const WRITTEN: &str = "written";
pub(crate) const ANONYMOUS: &str = "floor: plain anonymous memory";
pub(crate) const UFFD: &str = "uffd, given back";
const BARE_LOOP: &str = "rival: a page a fault";

/// The source of fresh memory.
#[derive(Clone, Copy)]
enum Touch {
    Write,
    Read,
}

impl Touch {
    fn title(self) -> &'static str {
        match self {
            Self::Write => WRITTEN,
            Self::Read => "read",
        }
    }
}

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let scale = bench.scale;
    let (count, mib): (u32, u64) = (scale.choose(25, 9, 1), scale.choose(256, 64, 4));
    let pages = (mib << 20) / LAYOUT_PAGE;
    let template = DATA_PAGES + pages;
    let zeros = DATA_PAGES..template;
    let file = TemplateFile::create(TemplateModel {
        size: template * LAYOUT_PAGE,
        seed: 1,
        layout: Layout {
            holes: std::iter::once(zeros.clone()).collect(),
            ..Layout::default()
        },
    })?;
    let bytes = read(file.path())?;
    let server = InProcess::start(file.path())?;
    let mut samples = Samples::default();
    let progress = rounds(Section::Zeros, count);
    let mut number = 0;
    for round in 0..count {
        for touch in [Touch::Write, Touch::Read] {
            for system in in_turn(&[ANONYMOUS, UFFD, BARE_LOOP], round) {
                interrupt.check()?;
                let vmm = sim_vmm::spawn()?;
                let folder = folder()?;
                // The loop takes the same time for each page, so a part of them is enough.
                let mut touched = zeros.clone();
                match system {
                    ANONYMOUS => vmm.run(MapAnonymous {
                        size: file.model().size,
                    })?,
                    UFFD => {
                        number += 1;
                        let fork = server.connect(number, &vmm, file.model())?;
                        wait_until_given_back(&fork, pages * LAYOUT_PAGE)?;
                    }
                    _ => {
                        let floor = Floor::start_with(Strategy::Demand, &folder.path().join("socket"), &bytes, 1)?;
                        vmm.run(Connect::new(floor.socket(), file.model()))?;
                        touched.end = touched.start + pages.div_ceil(16);
                    }
                }
                let visited = visit(&vmm, touched, touch)?;
                let subject = Subject::new(touch.title(), system);
                let nanos = to_f64(visited.elapsed_ns) / to_f64(visited.pages);
                samples.add(&subject, Measure::NanosPerPage, nanos);
            }
        }
        samples.next_round();
        progress.advance(1);
    }
    progress.done("measured");
    server.end()?;

    let about = [format!(
        "A guest touches {mib} MiB that are zeros in the template, one word a page, in ascending order. Written: it writes \
         first, as to fresh memory. Read: it only reads. Runs of zeros are given back to the kernel at the start of a fork, and \
         the measurement begins after that. The floor is a process that touches anonymous memory of its own, without a page \
         server. The rival is the bare loop, which copies zeros."
    )];
    let mut report = SectionReport::new(Section::Zeros, &about, samples.rows(ANONYMOUS));
    let (ours, floor) = (
        Subject::new(Touch::Write.title(), UFFD),
        Subject::new(Touch::Write.title(), ANONYMOUS),
    );
    report.goal(
        "fresh memory, for runs given back",
        Some("plain anonymous memory"),
        Goal::AtMost(1.3),
        samples.ratio(&ours, &floor, Measure::NanosPerPage),
    );
    report.warn_if_noisy(&samples, &floor, Measure::NanosPerPage);
    Ok(report)
}

/// Waits until this number of bytes of zeros has been given back to the kernel, once, at the start of a fork.
fn wait_until_given_back(fork: &Fork, bytes: u64) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stats = fork.status().stats;
        if stats.given_back_bytes >= bytes {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "only {} of {bytes} bytes of zeros were given back",
            stats.given_back_bytes
        );
        std::thread::sleep(PACE);
    }
}

fn visit(vmm: &SimVmm, pages: Range<u64>, touch: Touch) -> Result<Visited> {
    vmm.run(Visit {
        runs: std::iter::once(pages).collect(),
        write: matches!(touch, Touch::Write),
    })
}
