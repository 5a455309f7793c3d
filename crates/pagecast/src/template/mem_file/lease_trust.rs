//! Whether a lease vouches for a mem-file being unchanged, so that it need not be compared for each fault.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The shortest time that a lease has to hold up writers for (`fs.lease-break-time`), to be relied upon.
const SHORTEST_BREAK: Duration = Duration::from_secs(20);

/// If nobody has looked for so long, the process may have been stopped all the while, and a writer been let in without the
/// lease's thread having run. Well below [`SHORTEST_BREAK`].
const LONGEST_GAP: Duration = Duration::from_secs(5);

/// How long the file is looked at itself after such a gap: more than enough for the lease's thread to run.
const AFTER_GAP: Duration = Duration::from_secs(2);

/// Looking is noted no more often than this, so that threads do not fight for it.
const NOTED: Duration = Duration::from_millis(10);

/// Trust in a lease, for as long as it is held and its thread would have told us if it were not.
///
/// While a lease is held nobody can write the file, and for [`SHORTEST_BREAK`] after somebody wants to. The thread that the
/// kernel tells of that revokes the trust, within microseconds as a rule. It could be late only where the whole process
/// is stopped, and then whoever asks has not asked for a while.
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

    /// There is a lease, and the file was seen to be unchanged since.
    pub(super) fn grant(&self) {
        if break_time().is_some_and(|time| time >= SHORTEST_BREAK) {
            self.last_asked.store(self.now(), Ordering::Relaxed);
            self.granted.store(true, Ordering::Release);
        }
    }

    /// The lease is broken, or about to be dropped.
    pub(super) fn revoke(&self) {
        self.granted.store(false, Ordering::Release);
    }

    /// Whether the file needs not be looked at. To be asked after its bytes were read and before they are given away.
    pub(super) fn holds(&self) -> bool {
        self.holds_now().is_some()
    }

    /// The same, and when that was found.
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

/// A time since some moment, to within some milliseconds.
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

/// Some milliseconds old, for a tenth of the price.
fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::MonotonicCoarse)).unwrap_or_default()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How long the kernel holds up whoever breaks a lease.
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
