//! Looking at a server from outside: what it holds, what it uses, how often it wakes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pagecast_testkit::process::{MemoryUse, ProcessUse};
use procfs::process::Process;

/// What a server has used since some moment.
pub(super) struct Watch {
    pid: u32,
    started: Instant,
    cpu: Duration,
    wakeups: HashMap<i32, u64>,
}

/// What it came to.
pub(super) struct Seen {
    pub(super) elapsed: Duration,
    /// To the clock tick.
    pub(super) cpu: Duration,
    /// How often a thread of it slept and woke.
    pub(super) wakeups: u64,
    /// Now, exactly.
    pub(super) resident_bytes: u64,
    pub(super) fds: usize,
    pub(super) threads: u64,
}

impl Watch {
    pub(super) fn of(pid: u32) -> Result<Self> {
        Ok(Self {
            pid,
            cpu: ProcessUse::of(pid)?.cpu_time,
            wakeups: wakeups(pid)?,
            started: Instant::now(),
        })
    }

    /// What has been since, and now. The next begins.
    pub(super) fn end(&mut self) -> Result<Seen> {
        let elapsed = self.started.elapsed();
        let now = ProcessUse::of(self.pid)?;
        let seen = Seen {
            elapsed,
            cpu: now.cpu_time.saturating_sub(self.cpu),
            wakeups: added(&self.wakeups, &wakeups(self.pid)?),
            // The counter in `stat` is not exact.
            resident_bytes: MemoryUse::of(self.pid)?.rss_bytes,
            fds: now.fds,
            threads: now.threads,
        };
        *self = Self::of(self.pid)?;
        Ok(seen)
    }
}

/// The most that was ever resident, in bytes.
pub(super) fn peak_bytes(pid: u32) -> Result<u64> {
    let status = Process::new(pid.try_into()?)?.status()?;
    Ok(status.vmhwm.context("the kernel does not tell the peak")? << 10)
}

/// How often each of its threads has slept so far.
fn wakeups(pid: u32) -> Result<HashMap<i32, u64>> {
    let mut wakeups = HashMap::new();
    for task in Process::new(pid.try_into()?)?.tasks()? {
        // One that has ended meanwhile sleeps no more.
        let Ok((tid, status)) = task.and_then(|task| Ok((task.tid, task.status()?))) else {
            continue;
        };
        wakeups.insert(tid, status.voluntary_ctxt_switches.unwrap_or_default());
    }
    Ok(wakeups)
}

/// How many wakeups there were between; one for each thread that has ended, of which no more is known.
fn added(before: &HashMap<i32, u64>, after: &HashMap<i32, u64>) -> u64 {
    let ended = before.keys().filter(|tid| !after.contains_key(tid)).count() as u64;
    let of_thread = |(tid, now): (&i32, &u64)| now.saturating_sub(before.get(tid).copied().unwrap_or_default());
    ended + after.iter().map(of_thread).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_end_do_not_hide_wakeups_of_others() {
        let before = HashMap::from([(1, 1000), (2, 10)]);
        let after = HashMap::from([(2, 15), (3, 2)]);
        assert_eq!(added(&before, &after), 8);
    }
}
