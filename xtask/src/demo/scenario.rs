//! The life of the forks of one template, from their restore to the last check of their memory; the same for every
//! backend.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pagecast_bench::daemon::{Daemon, TEMPLATE};
use pagecast_bench::fleet::{Blank, Mismatches, Template, Vmm, WRITE_EVERY, at_once, tag};
use pagecast_bench::interrupt::Interrupt;
use pagecast_bench::progress::Progress;
use pagecast_client::fork::{Faults, Latency};
use pagecast_client::{Backend, CreateFork, CreatedFork, ForkState};
use pagecast_testkit::process::{MemoryUse, ProcessUse};

use super::SIZE;

/// MiB that a guest checks with one command, so that progress can be shown.
const STEP_MIB: u32 = 8;

/// How forks get their memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) name: &'static str,
    /// The backend to request.
    pub(super) backend: Backend,
    /// Another fork is recorded first.
    pub(super) is_trained: bool,
}

/// Many forks of one template at once, with one backend and their own daemon.
pub(super) struct Scenario<'a> {
    /// The command.
    pub(super) pagecast: &'a Path,
    pub(super) template: &'a dyn Template,
    pub(super) forks: u32,
    pub(super) way: Way,
    pub(super) interrupt: &'a Interrupt,
}

/// The result.
pub(super) struct Played {
    pub(super) way: Way,
    /// The backend that the daemon chose, and its reason.
    pub(super) backend: Backend,
    pub(super) reason: String,
    pub(super) forks: Vec<PlayedFork>,
    /// Memory and CPU time of the daemon when all forks had read all their memory.
    pub(super) server: ProcessUse,
}

/// The result of one fork.
pub(super) struct PlayedFork {
    /// Its number, from 1 on.
    pub(super) number: u32,
    pub(super) pid: u32,
    /// Time to load the template and resume.
    pub(super) resumed_in: Duration,
    /// Time to load, resume, and read and check the working set.
    pub(super) read_in: Duration,
    /// Wrong words of all checks.
    pub(super) mismatches: Mismatches,
    /// Its memory after it had read and written its working set, while it was served.
    pub(super) memory: MemoryUse,
    /// The daemon's counts; `None` if the kernel answers the faults.
    pub(super) faults: Option<Faults>,
    pub(super) fault_latency_us: Option<Latency>,
}

/// A living fork.
struct Fork {
    number: u32,
    vmm: Box<dyn Vmm>,
    resumed_in: Duration,
    read_in: Duration,
    mismatches: Mismatches,
}

impl Scenario<'_> {
    /// Runs the scenario. At its end the daemon and all forks have ended. `folder` must exist, and be used for this
    /// alone.
    pub(super) fn play(&self, folder: &Path) -> Result<Played> {
        let mut daemon = Daemon::start(self.pagecast, folder, &[])?;
        let played = self.play_with(&mut daemon);
        played.map_err(|error| daemon.explain(&error))
    }

    fn play_with(&self, daemon: &mut Daemon) -> Result<Played> {
        daemon.add_template(self.template.mem_file())?;
        if self.way.is_trained {
            let progress = Progress::start("recording the working set of another fork");
            daemon.learn(self.template)?;
            progress.done("kept beside the memory file");
        }
        let progress = Progress::start(&format!("starting {} VMMs", self.forks));
        let vmms = at_once((0..self.forks).collect(), |_| self.template.start())?;
        progress.done("none has memory yet");

        let (created, mut forks) = self.restore(daemon, vmms)?;
        let (working_set, whole) = (self.template.working_set(), self.template.whole());
        let what = format!("each reads and checks its working set of {} MiB", SIZE.data_mib);
        self.check(&what, &working_set, &mut forks, |fork, started| {
            fork.read_in = fork.resumed_in + started.elapsed();
        })?;
        self.write(&mut forks)?;
        self.check("each checks it again", &working_set, &mut forks, |_, _| {})?;
        let memory = memory_of(forks.iter().map(|fork| fork.vmm.pid()))?;
        self.check("each checks all its memory, zeros too", &whole, &mut forks, |_, _| {})?;
        let server = ProcessUse::of(daemon.pid())?;
        let told = self.what_the_daemon_tells(daemon)?;

        let progress = Progress::start("stopping pagecast (SIGTERM) while the forks live");
        daemon.stop()?;
        progress.done("it has ended, they run on");
        self.check(
            "each checks all once more, with pagecast gone",
            &whole,
            &mut forks,
            |_, _| {},
        )?;

        let forks = forks.into_iter().zip(memory).zip(told);
        Ok(Played {
            way: self.way,
            backend: created.backend,
            reason: created.reason,
            forks: forks
                .map(|((fork, memory), (faults, fault_latency_us))| PlayedFork {
                    number: fork.number,
                    pid: fork.vmm.pid(),
                    resumed_in: fork.resumed_in,
                    read_in: fork.read_in,
                    mismatches: fork.mismatches,
                    memory,
                    faults,
                    fault_latency_us,
                })
                .collect(),
            server,
        })
    }

    /// Restores all forks at once. Also returns the daemon's answer for one of them.
    fn restore(&self, daemon: &Daemon, vmms: Vec<Box<dyn Blank + '_>>) -> Result<(CreatedFork, Vec<Fork>)> {
        let progress = Progress::start(&format!(
            "restoring {} forks at once with `{}`",
            self.forks, self.way.name
        ));
        let restored = at_once((1..).zip(vmms).collect(), |(number, vmm)| {
            let restored = self.restore_one(daemon, number, vmm);
            restored.with_context(|| format!("fork {number} failed to restore"))
        })?;
        let (mut created, forks): (Vec<_>, Vec<_>) = restored.into_iter().unzip();
        let created = created.pop().context("no forks")?;
        progress.done(&format!("all have resumed, with `{}`", created.backend));
        Ok((created, forks))
    }

    fn restore_one(&self, daemon: &Daemon, number: u32, vmm: Box<dyn Blank + '_>) -> Result<(CreatedFork, Fork)> {
        let wanted = CreateFork {
            id: Some(id(number)),
            backend: Some(self.way.backend),
            pid: Some(vmm.pid().try_into()?),
            ..CreateFork::of(TEMPLATE)
        };
        let created = daemon.call(async |client| client.create_fork(&wanted).await)?;
        let (vmm, resumed_in) = vmm.restore(tag(number), &created.mem_backend)?;
        let fork = Fork {
            number,
            vmm,
            resumed_in,
            read_in: Duration::ZERO,
            mismatches: Mismatches::default(),
        };
        Ok((created, fork))
    }

    /// Has all forks check this range at once. Calls `done` for each, with the start time.
    fn check(
        &self,
        what: &str,
        mib: &Range<u32>,
        forks: &mut [Fork],
        done: impl Fn(&mut Fork, Instant) + Sync,
    ) -> Result<()> {
        let found = |forks: &[Fork]| forks.iter().map(|fork| fork.mismatches.count).sum::<u64>();
        let before = found(forks);
        let progress = Progress::of(what, "MiB", u64::from(self.forks) * u64::from(mib.end - mib.start));
        at_once(forks.iter_mut().collect(), |fork| {
            let started = Instant::now();
            for start in mib.clone().step_by(STEP_MIB as usize) {
                self.interrupt.check()?;
                let step = start..mib.end.min(start + STEP_MIB);
                let size = step.end - step.start;
                let found = fork.vmm.verify(step);
                let found = found.with_context(|| format!("fork {} failed to check its memory", fork.number))?;
                fork.mismatches.add(found);
                progress.advance(size.into());
            }
            done(fork, started);
            Ok(())
        })?;
        match found(forks) - before {
            0 => progress.done("0 mismatches"),
            mismatches => progress.failed(&format!("{mismatches} mismatches")),
        }
        Ok(())
    }

    fn write(&self, forks: &mut [Fork]) -> Result<()> {
        let progress = Progress::start(&format!("each writes to 1/{WRITE_EVERY} of its pages"));
        at_once(forks.iter_mut().collect(), |fork| {
            let written = fork.vmm.write(self.template.working_set());
            written.with_context(|| format!("fork {} failed to write", fork.number))
        })?;
        progress.done("each its own");
        Ok(())
    }

    /// Returns the daemon's view of each fork, in their order. All must be served.
    fn what_the_daemon_tells(&self, daemon: &Daemon) -> Result<Vec<(Option<Faults>, Option<Latency>)>> {
        let told = (1..=self.forks).map(|number| {
            let fork = daemon.call(async |client| client.fork(&id(number)).await)?;
            ensure!(
                fork.state == ForkState::Serving,
                "{} is {}: {:?}",
                fork.id,
                fork.state,
                fork.error
            );
            Ok((fork.faults, fork.fault_latency_us))
        });
        told.collect()
    }
}

fn id(number: u32) -> String {
    format!("fork-{number}")
}

fn memory_of(pids: impl Iterator<Item = u32>) -> Result<Vec<MemoryUse>> {
    pids.map(MemoryUse::of).collect()
}
