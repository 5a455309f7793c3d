//! What happens in the demo, from the restore of the forks to their last look at their memory.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use pagecast_testkit::process::{MemoryUse, ProcessUse};

use super::progress::Progress;
use super::server::{Ended, Server};
use super::vmm::{Mismatches, Template, Vmm};
use crate::interrupt::Interrupt;

/// How much a guest is asked to check at once, in MiB, so that there is progress to show.
const STEP_MIB: u32 = 8;

/// Many forks of one template.
pub(super) struct Scenario<'a> {
    pub(super) template: &'a dyn Template,
    pub(super) forks: u32,
    pub(super) interrupt: &'a Interrupt,
}

/// What came of it.
pub(super) struct Played {
    pub(super) forks: Vec<PlayedFork>,
    /// What the server held and had used when all forks had read and written.
    pub(super) server: ProcessUse,
}

/// What came of one fork.
pub(super) struct PlayedFork {
    /// From 1 on.
    pub(super) number: u32,
    pub(super) pid: u32,
    /// To load the template and resume.
    pub(super) resumed_in: Duration,
    /// The same, and to read and check all memory.
    pub(super) all_read_in: Duration,
    /// Of all three times that it checked.
    pub(super) mismatches: Mismatches,
    /// After it had read and written, while it was served.
    pub(super) memory: MemoryUse,
    /// What the server said of it.
    pub(super) session: Ended,
}

/// A fork that lives.
struct Fork {
    number: u32,
    vmm: Box<dyn Vmm>,
    resumed_in: Duration,
    all_read_in: Duration,
    mismatches: Mismatches,
}

impl Scenario<'_> {
    /// Ends with the server gone and all forks ended.
    pub(super) fn play(&self, server: &mut Server) -> Result<Played> {
        let mut forks = self.restore_and_read(server.socket())?;
        self.write_and_read(&mut forks)?;
        let memory = forks
            .iter()
            .map(|fork| MemoryUse::of(fork.vmm.pid()))
            .collect::<Result<Vec<_>>>()?;
        let use_of_server = ProcessUse::of(server.pid())?;

        let progress = Progress::start("stopping pagecast (SIGTERM) while the forks live");
        let mut sessions = server.stop()?;
        progress.done("all forks are complete, it has ended");
        self.read_without_server(&mut forks)?;

        let forks = forks.into_iter().zip(memory).map(|(fork, memory)| {
            let pid = fork.vmm.pid();
            Ok(PlayedFork {
                number: fork.number,
                pid,
                resumed_in: fork.resumed_in,
                all_read_in: fork.all_read_in,
                mismatches: fork.mismatches,
                memory,
                session: sessions
                    .remove(&pid)
                    .with_context(|| format!("pagecast said nothing of fork {} (pid {pid})", fork.number))?,
            })
        });
        Ok(Played {
            forks: forks.collect::<Result<_>>()?,
            server: use_of_server,
        })
    }

    fn restore_and_read(&self, socket: &Path) -> Result<Vec<Fork>> {
        let what = format!("restoring {} forks at once, each checks all it reads", self.forks);
        let progress = Progress::of_mib(&what, self.all_mib());
        let forks = at_once((1..=self.forks).collect(), |number| {
            let restored = self.template.restore(number, socket);
            let (vmm, resumed_in) = restored.with_context(|| format!("fork {number} failed to restore"))?;
            let mut fork = Fork {
                number,
                vmm,
                resumed_in,
                all_read_in: Duration::ZERO,
                mismatches: Mismatches::default(),
            };
            let started = Instant::now();
            self.verify(&mut fork, &progress)?;
            fork.all_read_in = resumed_in + started.elapsed();
            Ok(fork)
        })?;
        end(progress, found(&forks));
        Ok(forks)
    }

    fn write_and_read(&self, forks: &mut [Fork]) -> Result<()> {
        let before = found(forks);
        let progress = Progress::of_mib("each writes to 1/8 of its pages and checks again", self.all_mib());
        at_once(forks.iter_mut().collect(), |fork| {
            let written = fork.vmm.write(self.template.checked_mib());
            written.with_context(|| format!("fork {} failed to write", fork.number))?;
            self.verify(fork, &progress)
        })?;
        end(progress, found(forks) - before);
        Ok(())
    }

    fn read_without_server(&self, forks: &mut [Fork]) -> Result<()> {
        let before = found(forks);
        let progress = Progress::of_mib("each checks once more, with pagecast gone", self.all_mib());
        at_once(forks.iter_mut().collect(), |fork| self.verify(fork, &progress))?;
        end(progress, found(forks) - before);
        Ok(())
    }

    fn verify(&self, fork: &mut Fork, progress: &Progress) -> Result<()> {
        let whole = self.template.checked_mib();
        for start in whole.clone().step_by(STEP_MIB as usize) {
            self.interrupt.check()?;
            let step = start..whole.end.min(start + STEP_MIB);
            progress.advance(u64::from(step.end - step.start));
            let found = fork.vmm.verify(step);
            let found = found.with_context(|| format!("fork {} failed to check its memory", fork.number))?;
            fork.mismatches.add(found);
        }
        Ok(())
    }

    fn all_mib(&self) -> u64 {
        let whole = self.template.checked_mib();
        u64::from(self.forks) * u64::from(whole.end - whole.start)
    }
}

/// How many mismatches all have found so far.
fn found(forks: &[Fork]) -> u64 {
    forks.iter().map(|fork| fork.mismatches.count).sum()
}

fn end(progress: Progress, mismatches: u64) {
    match mismatches {
        0 => progress.done("0 mismatches"),
        _ => progress.failed(&format!("{mismatches} mismatches")),
    }
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
