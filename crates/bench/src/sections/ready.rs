//! Time until a fork has read its working set.

use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pagecast::server::{ForkState, Prefault};
use pagecast_client::template::{Warm, WarmthState};
use pagecast_client::{AddTemplate, Backend, CreateFork};
use pagecast_testkit::floor::{Floor, Strategy, read};
use pagecast_testkit::sim_vmm::{Connect, MapFile, Memory, Resume, Resumed, SimVmm, Visit};
use pagecast_testkit::template_file::TemplateFile;
use tempfile::TempDir;

use super::cold::{cached, drop_from_page_cache};
use super::in_process::InProcess;
use super::turns::in_turn;
use super::working_set::WorkingSet;
use super::{Bench, PATIENCE, folder, rounds};
use crate::daemon::{Daemon, TEMPLATE};
use crate::goal::Goal;
use crate::interrupt::Interrupt;
use crate::measure::Measure;
use crate::progress::Progress;
use crate::report::SectionReport;
use crate::samples::{Samples, Subject};
use crate::section::Section;
use crate::sim_vmm;
use crate::spread::{mib, to_f64};

/// Time between two looks for a resident template.
const PACE: Duration = Duration::from_millis(5);
/// A template like the other, in another file, which is made resident.
const HOT: &str = "hot";

/// Part of a dropped file that may still be in the page cache.
const STILL_CACHED: f64 = 0.02;

/// A subject of this section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum System {
    /// A mapping of the template, without pagecast.
    Plain { cold: bool },
    /// A fork with `file`.
    File { cold: bool },
    /// A fork with `file` of a resident template.
    Hot,
    /// A fork with `uffd` without prefault.
    OnDemand,
    /// A fork with `uffd` and the working set of another fork.
    Prefault,
    /// The bare loop.
    BareLoop,
    /// All of the template at the first fault.
    AllAtOnce,
}

impl System {
    const ALL: [Self; 9] = [
        Self::Plain { cold: false },
        Self::File { cold: false },
        Self::Hot,
        Self::Prefault,
        Self::OnDemand,
        Self::BareLoop,
        Self::AllAtOnce,
        Self::Plain { cold: true },
        Self::File { cold: true },
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Plain { .. } => PLAIN,
            Self::File { .. } => FILE,
            Self::Hot => "file, hot",
            Self::OnDemand => ON_DEMAND,
            Self::Prefault => PREFAULT,
            Self::BareLoop => "rival: a page a fault",
            Self::AllAtOnce => "rival: all at the first fault",
        }
    }

    fn is_cold(self) -> bool {
        matches!(self, Self::Plain { cold: true } | Self::File { cold: true })
    }

    fn subject(self) -> Subject {
        Subject::new(if self.is_cold() { COLD } else { WARM }, self.name())
    }
}

pub(crate) const WARM: &str = "warm";
pub(crate) const COLD: &str = "cold";
pub(crate) const PLAIN: &str = "floor: plain MAP_PRIVATE";
pub(crate) const FILE: &str = "file";
pub(crate) const ON_DEMAND: &str = "uffd, on demand";
pub(crate) const PREFAULT: &str = "uffd, prefault";

/// Subjects that need no disk.
const QUICK_ONES: [System; 3] = [System::Plain { cold: false }, System::File { cold: false }, System::Hot];

/// The state that all rounds share.
struct Setup {
    set: WorkingSet,
    template: TemplateFile,
    /// The template.
    file: File,
    /// The resident template.
    _hot: TemplateFile,
    /// The reason if there is none.
    not_hot: Option<String>,
    bytes: Arc<[u8]>,
    daemon: Daemon,
    server: InProcess,
    /// Number of forks that the server has had.
    forks: Cell<usize>,
    folder: TempDir,
    /// Whether all of the template is in the page cache.
    is_warm: Cell<bool>,
}

pub(super) fn measure(bench: &Bench, interrupt: &Interrupt) -> Result<SectionReport> {
    let scale = bench.scale;
    let count: u32 = scale.choose(25, 3, 1);
    // Fast subjects are measured more often, so that their medians are as certain.
    let repeats: u32 = scale.choose(4, 4, 1);
    let (template, working_set): (u64, u64) = scale.choose((512, 64), (512, 64), (16, 2));
    let setup = Setup::new(bench, WorkingSet::new(template << 20, working_set << 20))?;
    let mut samples = Samples::default();
    for system in System::ALL {
        samples.expect(system.subject(), None);
    }
    let mut systems = System::ALL.to_vec();
    systems.retain(|system| !QUICK_ONES.contains(system));
    let mut quick_ones = QUICK_ONES.to_vec();
    let mut warnings = Vec::new();
    if let Some(why) = &setup.not_hot {
        quick_ones.retain(|system| *system != System::Hot);
        warnings.push(format!(
            "nothing hot was measured, because the template could not be made resident: {why}"
        ));
    }
    drop_from_page_cache(&setup.file)?;
    setup.is_warm.set(false);
    let cached = cached(&setup.file, &setup.set.runs)?;
    if cached > STILL_CACHED {
        systems.retain(|system| !system.is_cold());
        warnings.push(format!(
            "nothing cold was measured: {:.0}% of the working set stayed in the page cache, because of the file system of the \
             temporary folder",
            cached * 100.0
        ));
    }
    let progress = rounds(Section::Ready, count);
    for round in 0..count {
        for system in in_turn(&systems, round) {
            interrupt.check()?;
            // Disks are slow, and vary little compared with the others.
            if system.is_cold() && round % 2 == 1 {
                continue;
            }
            setup.measure(system, &mut samples)?;
        }
        for repeat in 0..repeats {
            for system in in_turn(&quick_ones, round + repeat) {
                setup.measure(system, &mut samples)?;
            }
        }
        samples.next_round();
        progress.advance(1);
    }
    progress.done("measured");

    let about = [
        format!(
            "A template of {template} MiB has 80% zeros that are written out, and data in runs of 1 to 31 pages. A fork reads one \
             word of each page in {} MiB of data, run by run in random order, from one thread. The time runs from the start of the \
             restore until all of these pages have been read.",
            mib(setup.set.bytes())
        ),
        "Cold: the template was written to disk, and its pages, but no other file's, were dropped from the page cache with \
         posix_fadvise(DONTNEED). A check confirms that they are gone. Warm: all pages are in the page cache, and other forks \
         have read them before. Hot: the same for another file, after `pagecast template warm --resident`. The working set of \
         `prefault` was recorded from one fork."
            .to_owned(),
        "Rivals are the strategies of Firecracker's two example handlers, with the template's bytes in memory: UFFDIO_COPY of \
         one page a fault, or of all guest memory at the first fault."
            .to_owned(),
    ];
    let mut report = SectionReport::new(Section::Ready, &about, samples.rows(PLAIN));
    report.warnings = warnings;
    let plain = System::Plain { cold: false }.subject();
    let warm = System::File { cold: false }.subject();
    report.goal(
        "working set ready, `uffd` with prefault",
        Some("`uffd` on demand"),
        Goal::AtMost(0.25),
        samples.ratio(
            &System::Prefault.subject(),
            &System::OnDemand.subject(),
            Measure::ReadyMs,
        ),
    );
    report.goal(
        "working set ready, `file`, warm",
        Some("a plain MAP_PRIVATE"),
        Goal::AtMost(1.1),
        samples.ratio(&warm, &plain, Measure::ReadyMs),
    );
    report.warn_if_noisy(&samples, &plain, Measure::ReadyMs);
    report.warn_if_noisy(&samples, &System::BareLoop.subject(), Measure::ReadyMs);
    Ok(report)
}

/// Adds it to the daemon, and makes it resident, as on a newly started host. Returns the reason if that is not possible
/// here, such as the limit of locked memory.
fn make_resident(daemon: &Daemon, template: &TemplateFile) -> Result<Option<String>> {
    let file = File::open(template.path()).context("failed to open the template")?;
    drop_from_page_cache(&file)?;
    let add = AddTemplate::new(template.path());
    daemon.call(async |client| client.add_template(HOT, &add).await)?;
    let warm = Warm { resident: true };
    let mut warmed = match daemon.call(async |client| client.warm_template(HOT, warm).await) {
        Ok(warmed) => warmed,
        Err(refused) => return Ok(Some(format!("{refused:#}"))),
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match warmed.warmth {
            Some(warmth) if warmth.state == WarmthState::Warm => return Ok(None),
            Some(warmth) if warmth.state == WarmthState::Warming => {}
            failed => {
                let error = failed.and_then(|warmth| warmth.error);
                return Ok(Some(error.unwrap_or_else(|| "no reason is given".to_owned())));
            }
        }
        ensure!(Instant::now() < deadline, "the template does not become resident");
        std::thread::sleep(PACE);
        warmed = daemon.call(async |client| client.template(HOT).await)?;
    }
}

impl Setup {
    fn new(bench: &Bench, set: WorkingSet) -> Result<Self> {
        let progress = Progress::start("writing a template");
        let template = set.write()?;
        let file = File::open(template.path()).context("failed to open the template")?;
        let folder = folder()?;
        let daemon = Daemon::start(&bench.pagecast, folder.path(), &[])?;
        daemon.add_template(template.path())?;
        let hot = set.write()?;
        let not_hot = make_resident(&daemon, &hot)?;
        let bytes = read(template.path())?;
        let server = InProcess::start(template.path())?;
        server.find_zeros();
        let learned = server.learn(&sim_vmm::spawn()?, template.model(), &set.runs)?;
        ensure!(
            learned == set.bytes(),
            "of a working set of {} bytes {learned} were recorded",
            set.bytes()
        );
        progress.done(&format!("{} MiB", mib(set.model.size)));
        Ok(Self {
            set,
            file,
            bytes,
            daemon,
            server,
            forks: Cell::new(0),
            folder,
            template,
            is_warm: Cell::new(true),
            _hot: hot,
            not_hot,
        })
    }

    /// Drops the template from the page cache. Pages that the server maps stay until it notices the end of the last
    /// fork, so this is repeated until they are gone.
    fn drop_until_gone(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            drop_from_page_cache(&self.file)?;
            let cached = cached(&self.file, &self.set.runs)?;
            if cached <= STILL_CACHED {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{:.0}% of what was dropped from the page cache is there again",
                cached * 100.0
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Gets one fork ready.
    fn measure(&self, system: System, samples: &mut Samples) -> Result<()> {
        if system.is_cold() {
            self.is_warm.set(false);
            self.drop_until_gone()?;
        } else if !self.is_warm.replace(true) {
            let mut file = File::open(self.template.path()).context("failed to open the template")?;
            std::io::copy(&mut file, &mut std::io::sink()).context("failed to read the template")?;
        }
        let vmm = sim_vmm::spawn()?;
        let (resumed, installed) = match system {
            System::Plain { .. } => {
                let map = MapFile::new(self.template.path(), self.template.model());
                (self.resume(&vmm, Memory::File(map))?, 0)
            }
            System::File { .. } => self.file(vmm, TEMPLATE)?,
            System::Hot => self.file(vmm, HOT)?,
            System::OnDemand => self.uffd(&vmm, Prefault::None)?,
            System::Prefault => self.uffd(&vmm, Prefault::WorkingSet)?,
            System::BareLoop => self.rival(&vmm, Strategy::Demand, self.set.bytes())?,
            System::AllAtOnce => self.rival(&vmm, Strategy::AllAtFirstFault, self.set.model.size)?,
        };
        let subject = system.subject();
        samples.add(&subject, Measure::ReadyMs, to_f64(resumed.ready_ns) / 1e6);
        samples.add(&subject, Measure::InstalledMib, mib(installed));
        Ok(())
    }

    /// Gives a VMM memory from this source.
    fn resume(&self, vmm: &SimVmm, memory: Memory) -> Result<Resumed> {
        vmm.run(Resume {
            memory,
            visit: Visit {
                runs: self.set.runs.clone(),
                write: false,
            },
        })
    }

    fn rival(&self, vmm: &SimVmm, strategy: Strategy, installs: u64) -> Result<(Resumed, u64)> {
        let folder = tempfile::tempdir_in(&self.folder).context("failed to create a folder")?;
        let floor = Floor::start_with(strategy, &folder.path().join("socket"), &self.bytes, 1)?;
        let connect = Connect::new(floor.socket(), self.template.model());
        Ok((self.resume(vmm, Memory::Uffd(connect))?, installs))
    }

    fn uffd(&self, vmm: &SimVmm, prefault: Prefault) -> Result<(Resumed, u64)> {
        let number = self.forks.replace(self.forks.get() + 1);
        let fork = self.server.register(number, |options| options.prefault(prefault))?;
        let connect = Connect::new(fork.socket_path(), self.template.model());
        let resumed = self.resume(vmm, Memory::Uffd(connect))?;
        // A page is counted after the guest was woken: the fork ends after all of that.
        vmm.kill()?;
        let status = fork.wait(PATIENCE, ForkState::is_end);
        Ok((resumed, status.stats.installed_bytes))
    }

    /// A fork of the daemon.
    fn file(&self, vmm: SimVmm, template: &str) -> Result<(Resumed, u64)> {
        let wanted = CreateFork {
            backend: Some(Backend::File),
            pid: Some(vmm.pid().try_into()?),
            ..CreateFork::of(template)
        };
        let created = self.daemon.call(async |client| client.create_fork(&wanted).await)?;
        let map = MapFile::new(created.mem_backend.backend_path, self.template.model());
        let resumed = self.resume(&vmm, Memory::File(map))?;
        drop(vmm);
        let fork = self.daemon.await_end(&created.id)?;
        self.daemon
            .call(async |client| client.remove_fork(&created.id, false).await)?;
        Ok((resumed, fork.installed_bytes))
    }
}
