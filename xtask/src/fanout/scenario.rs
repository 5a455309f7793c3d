//! What forks of one template do, from their restore to their last look at their memory; the same for every backend.

use std::num::NonZeroU8;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use pagecast_client::fork::{Faults, Latency};
use pagecast_client::{Backend, CreateFork, CreatedFork, ForkState};
use pagecast_testkit::process::{MemoryUse, ProcessUse};

use super::vmm::{Blank, Mismatches, Template, Vmm};
use super::{DATA_MIB, WRITE_EVERY};
use crate::daemon::{Daemon, TEMPLATE};
use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// How much a guest is asked to check at once, in MiB, so that there is progress to show.
const STEP_MIB: u32 = 8;

/// Many forks of one template at once, with one backend, and a daemon of their own.
pub(crate) struct Scenario<'a> {
    /// The command.
    pub(crate) pagecast: &'a Path,
    pub(crate) template: &'a dyn Template,
    pub(crate) forks: u32,
    /// What the daemon is asked for.
    pub(crate) backend: Backend,
    pub(crate) interrupt: &'a Interrupt,
}

/// What came of it.
pub(crate) struct Played {
    pub(crate) asked: Backend,
    /// What the daemon has chosen, and why.
    pub(crate) backend: Backend,
    pub(crate) reason: String,
    pub(crate) forks: Vec<PlayedFork>,
    /// All VMMs before they had a guest.
    pub(crate) blank: Vec<MemoryUse>,
    /// All VMMs after their guests had been resumed, and before they were asked for anything.
    pub(crate) idle: Vec<MemoryUse>,
    /// What the daemon held and had used when all forks had read all their memory.
    pub(crate) server: ProcessUse,
}

/// What came of one fork.
pub(crate) struct PlayedFork {
    /// From 1 on.
    pub(crate) number: u32,
    pub(crate) pid: u32,
    /// To load the template and resume.
    pub(crate) resumed_in: Duration,
    /// The same, and to read and check the working set.
    pub(crate) read_in: Duration,
    /// Of all times that it checked.
    pub(crate) mismatches: Mismatches,
    /// After it had read and written its working set, while it was served.
    pub(crate) memory: MemoryUse,
    /// What the daemon says; nothing where the kernel answers the faults.
    pub(crate) faults: Option<Faults>,
    pub(crate) fault_latency_us: Option<Latency>,
}

/// A fork that lives.
struct Fork {
    number: u32,
    vmm: Box<dyn Vmm>,
    resumed_in: Duration,
    read_in: Duration,
    mismatches: Mismatches,
}

impl Scenario<'_> {
    /// Ends with the daemon gone and all forks ended. `folder` must be there, and for this alone.
    pub(crate) fn play(&self, folder: &Path) -> Result<Played> {
        let mut daemon = Daemon::start(self.pagecast, folder, &[])?;
        let played = self.play_with(&mut daemon);
        played.map_err(|error| daemon.explain(&error))
    }

    fn play_with(&self, daemon: &mut Daemon) -> Result<Played> {
        daemon.add_template(self.template.mem_file())?;
        let progress = Progress::start(&format!("starting {} VMMs", self.forks));
        let vmms = at_once((0..self.forks).collect(), |_| self.template.start())?;
        let blank = memory_of(vmms.iter().map(|vmm| vmm.pid()))?;
        progress.done("none has memory yet");

        let (created, mut forks) = self.restore(daemon, vmms)?;
        let idle = memory_of(forks.iter().map(|fork| fork.vmm.pid()))?;
        let (working_set, whole) = (self.template.working_set(), self.template.whole());
        let what = format!("each reads and checks its working set of {DATA_MIB} MiB");
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
            asked: self.backend,
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
            blank,
            idle,
            server,
        })
    }

    /// Restores all at once; also what the daemon answered for one of them.
    fn restore(&self, daemon: &Daemon, vmms: Vec<Box<dyn Blank + '_>>) -> Result<(CreatedFork, Vec<Fork>)> {
        let progress = Progress::start(&format!(
            "restoring {} forks at once with `{}`",
            self.forks, self.backend
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
            backend: Some(self.backend),
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

    /// Has all check this range at once. `done` is called for each as soon as it has, with the time of its start.
    fn check(
        &self,
        what: &str,
        mib: &Range<u32>,
        forks: &mut [Fork],
        done: impl Fn(&mut Fork, Instant) + Sync,
    ) -> Result<()> {
        let found = |forks: &[Fork]| forks.iter().map(|fork| fork.mismatches.count).sum::<u64>();
        let before = found(forks);
        let progress = Progress::of_mib(what, u64::from(self.forks) * u64::from(mib.end - mib.start));
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

    /// Of each fork, in their order. All must be served.
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

/// Tells apart what forks write, as far as there are enough tags: 254.
fn tag(number: u32) -> NonZeroU8 {
    let tag = u8::try_from(number % 254).expect("it is less than 254");
    NonZeroU8::MIN.saturating_add(tag)
}

fn memory_of(pids: impl Iterator<Item = u32>) -> Result<Vec<MemoryUse>> {
    pids.map(MemoryUse::of).collect()
}

/// Works on all items at the same time, a thread each. The first error, once all are done.
fn at_once<I: Send, T: Send>(items: Vec<I>, work: impl Fn(I) -> Result<T> + Sync) -> Result<Vec<T>> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
        // All are waited for before any outcome is looked at.
        let outcomes: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        outcomes
            .into_iter()
            .map(|outcome| outcome.unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_different_tags() {
        for number in 1..1000 {
            assert_ne!(tag(number), tag(number + 1), "{number}");
            assert!(tag(number).get() < u8::MAX, "one more than it is a pattern");
        }
    }

    #[test]
    fn all_work_is_done_in_order_and_at_the_same_time() {
        let barrier = std::sync::Barrier::new(20);
        let doubled = at_once((0..20).collect(), |number: u32| {
            barrier.wait();
            Ok(2 * number)
        });
        assert_eq!(doubled.unwrap(), (0..20).map(|number| 2 * number).collect::<Vec<_>>());
    }

    #[test]
    fn one_error_and_one_panic_are_errors() {
        assert!(
            at_once(vec![1, 2], |number| if number == 2 {
                Err(anyhow!("two"))
            } else {
                Ok(())
            })
            .is_err()
        );
        assert!(at_once(vec![1, 0], |number: u32| Ok(1_u32.div_euclid(number))).is_err());
    }
}
