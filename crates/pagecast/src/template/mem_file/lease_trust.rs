//! Trust in a lease: with it, a mem-file need not be compared for each fault.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The shortest `fs.lease-break-time` (how long a lease holds up writers) that is relied upon.
const SHORTEST_BREAK: Duration = Duration::from_secs(20);

/// If no thread has asked for this long, the process may have been stopped. A writer may have been let in before the
/// thread of the lease ran. Well below [`SHORTEST_BREAK`].
const LONGEST_GAP: Duration = Duration::from_secs(5);

/// How long the file itself is checked after such a gap: more than enough for the thread of the lease to run.
const AFTER_GAP: Duration = Duration::from_secs(2);

/// The shortest time between two updates of `last_asked`, so that threads do not contend for it.
const NOTED: Duration = Duration::from_millis(10);

/// Trust in a lease, as long as the lease is held and its thread has not reported a break.
///
/// The file cannot be written while the lease is held, nor for [`SHORTEST_BREAK`] after a writer breaks it. The kernel
/// signals the break to the thread of the lease, which revokes the trust, usually within microseconds. That thread
/// could be late only if the whole process is stopped. In that case, the other threads have not asked for a while
/// either.
#[derive(Debug)]
pub(super) struct LeaseTrust {
    granted: AtomicBool,
    epoch: Duration,
    /// Microseconds since `epoch`.
    last_asked: AtomicU64,
    not_before: AtomicU64,
}

impl LeaseTrust {
    pub(super) fn new() -> Self {
        Self {
            granted: AtomicBool::new(false),
            epoch: now(),
            last_asked: AtomicU64::new(0),
            not_before: AtomicU64::new(0),
        }
    }

    /// Grants the trust: there is a lease, and the file was seen to be unchanged since.
    pub(super) fn grant(&self) {
        if break_time().is_some_and(|time| time >= SHORTEST_BREAK) {
            self.last_asked.store(self.now(), Ordering::Relaxed);
            self.granted.store(true, Ordering::Release);
        }
    }

    /// Revokes the trust: the lease is broken, or about to be dropped.
    pub(super) fn revoke(&self) {
        self.granted.store(false, Ordering::Release);
    }

    /// Returns `true` if the file needs no check. Call after its bytes were read and before a fork gets them.
    pub(super) fn holds(&self) -> bool {
        self.holds_now().is_some()
    }

    /// Like [`holds`](Self::holds), and returns the time of the answer.
    pub(super) fn holds_now(&self) -> Option<CoarseTime> {
        if !self.granted.load(Ordering::Acquire) {
            return None;
        }
        let now = self.now();
        self.holds_at(now).then_some(CoarseTime(now))
    }

    fn holds_at(&self, now: u64) -> bool {
        let asked = self.last_asked.load(Ordering::Relaxed);
        let gap = now.saturating_sub(asked);
        if gap >= micros(NOTED) {
            self.last_asked.store(now, Ordering::Relaxed);
            if gap >= micros(LONGEST_GAP) {
                self.not_before.store(now + micros(AFTER_GAP), Ordering::Relaxed);
            }
        }
        now >= self.not_before.load(Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        micros(now().saturating_sub(self.epoch))
    }
}

/// A time since some moment, accurate to some milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct CoarseTime(u64);

impl CoarseTime {
    #[cfg(test)]
    pub(super) fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    pub(super) fn micros(self) -> u64 {
        self.0
    }
}

/// The current time, some milliseconds old, at a tenth of the cost.
fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::MonotonicCoarse)).unwrap_or_default()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How long the kernel holds up a writer that breaks a lease.
fn break_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/sys/fs/lease-break-time").ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_trusted_without_a_lease_or_after_it() {
        let trust = LeaseTrust::new();
        assert!(!trust.holds());
        trust.grant();
        let expected = break_time().is_some_and(|time| time >= SHORTEST_BREAK);
        assert_eq!(trust.holds(), expected);
        trust.revoke();
        assert!(!trust.holds());
    }

    #[test]
    fn after_a_gap_the_file_is_looked_at_for_a_while() {
        let trust = LeaseTrust::new();
        let at = |seconds: u64| trust.holds_at(seconds * 1_000_000);
        // Asked every other second.
        assert!([1, 3, 5, 7].into_iter().all(at));
        // Stopped for a minute.
        assert_eq!([67, 68, 69, 70].map(at), [false, false, true, true]);
        assert_eq!([74, 79, 80, 81].map(at), [true, false, false, true]);
    }

    #[test]
    fn two_threads_that_ask_at_once_after_a_gap_both_look() {
        let trust = LeaseTrust::new();
        assert!(!trust.holds_at(60_000_000));
        assert!(!trust.holds_at(60_000_001));
    }
}
