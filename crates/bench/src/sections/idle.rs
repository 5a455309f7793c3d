//! Observation of a server from outside: memory, CPU time, wakes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use pagecast_testkit::process::{MemoryUse, ProcessUse};
use procfs::process::Process;

/// The resources that a server has used since a moment.
pub(super) struct Watch {
    pid: u32,
    started: Instant,
    threads: HashMap<i32, Thread>,
}

/// The counters of a thread.
#[derive(Clone, Copy, Debug, Default)]
struct Thread {
    /// Number of sleeps.
    sleeps: u64,
    /// Nanoseconds on a processor.
    cpu: u64,
}

/// The difference between two moments.
pub(super) struct Seen {
    pub(super) elapsed: Duration,
    /// Without the last usage of threads that have ended meanwhile.
    pub(super) cpu: Duration,
    /// Number of sleeps and wakes of its threads.
    pub(super) wakeups: u64,
    /// Resident memory now, exact.
    pub(super) resident_bytes: u64,
    /// The part of it that belongs to no file.
    pub(super) own_bytes: u64,
    pub(super) fds: usize,
    pub(super) threads: u64,
}

impl Watch {
    pub(super) fn of(pid: u32) -> Result<Self> {
        Ok(Self {
            pid,
            threads: threads(pid)?,
            started: Instant::now(),
        })
    }

    /// Returns the usage since the last call, and starts the next period.
    pub(super) fn end(&mut self) -> Result<Seen> {
        let elapsed = self.started.elapsed();
        let threads = threads(self.pid)?;
        let now = ProcessUse::of(self.pid)?;
        let ended = self.threads.keys().filter(|tid| !threads.contains_key(tid)).count() as u64;
        let seen = Seen {
            elapsed,
            cpu: Duration::from_nanos(added(&self.threads, &threads, |thread| thread.cpu)),
            // One for each ended thread, of which no more is known.
            wakeups: ended + added(&self.threads, &threads, |thread| thread.sleeps),
            // The counter in `stat` is not exact.
            resident_bytes: MemoryUse::of(self.pid)?.rss_bytes,
            own_bytes: now.own_bytes,
            fds: now.fds,
            threads: now.threads,
        };
        *self = Self::of(self.pid)?;
        Ok(seen)
    }
}

/// Reads the counters of all its threads.
fn threads(pid: u32) -> Result<HashMap<i32, Thread>> {
    let mut threads = HashMap::new();
    for task in Process::new(pid.try_into()?)?.tasks()? {
        // A thread that has ended meanwhile.
        let Ok((tid, status, times)) = task.and_then(|task| Ok((task.tid, task.status()?, task.schedstat()?))) else {
            continue;
        };
        let thread = Thread {
            sleeps: status.voluntary_ctxt_switches.unwrap_or_default(),
            cpu: times.sum_exec_runtime,
        };
        threads.insert(tid, thread);
    }
    Ok(threads)
}

/// Sum of the increase in threads that have not ended.
fn added(before: &HashMap<i32, Thread>, after: &HashMap<i32, Thread>, of: fn(&Thread) -> u64) -> u64 {
    let of_thread = |(tid, now): (&i32, &Thread)| of(now).saturating_sub(before.get(tid).map_or(0, of));
    after.iter().map(of_thread).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_end_do_not_hide_what_others_did() {
        let thread = |sleeps| Thread { sleeps, cpu: 0 };
        let before = HashMap::from([(1, thread(1000)), (2, thread(10))]);
        let after = HashMap::from([(2, thread(15)), (3, thread(2))]);
        assert_eq!(added(&before, &after, |thread| thread.sleeps), 7);
    }

    #[test]
    fn this_process_is_seen_at_work() {
        let mut watch = Watch::of(std::process::id()).unwrap();
        let worked: u64 = (0..20_000_000).map(std::hint::black_box).sum();
        let seen = watch.end().unwrap();
        assert!(worked > 0 && !seen.cpu.is_zero(), "{:?}", seen.cpu);
        assert!(seen.threads > 0 && seen.fds > 0 && seen.resident_bytes > 0);
    }
}
