//! How many workers of a server are busy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A worker is busy if it has answered a fault within this time.
const RECENT: Duration = Duration::from_millis(2);

/// The time of the last fault of each worker of a server.
#[derive(Debug)]
pub(in crate::server) struct BusyWorkers {
    epoch: Instant,
    /// Nanoseconds since `epoch`; 0 for none.
    last: Box<[AtomicU64]>,
    /// Workers that may be busy while one polls.
    few: usize,
}

impl BusyWorkers {
    /// Creates it for this many workers on this many processors.
    pub(in crate::server) fn new(workers: usize, processors: usize) -> Self {
        Self {
            epoch: Instant::now(),
            last: (0..workers).map(|_| AtomicU64::new(0)).collect(),
            few: (processors / 2).max(1),
        }
    }

    /// Notes that a worker has answered a fault.
    pub(super) fn note_fault(&self, worker: usize, now: Instant) {
        if let Some(last) = self.last.get(worker) {
            last.store(self.nanos(now), Ordering::Relaxed);
        }
    }

    /// Returns `true` if at most half of the processors have a busy worker. The others are for the vCPUs.
    pub(super) fn are_few(&self, now: Instant) -> bool {
        let since = self.nanos(now.checked_sub(RECENT).unwrap_or(self.epoch));
        let busy = self.last.iter().filter(|last| last.load(Ordering::Relaxed) > since);
        busy.count() <= self.few
    }

    fn nanos(&self, time: Instant) -> u64 {
        let time = time.saturating_duration_since(self.epoch);
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_processors_may_have_a_busy_worker() {
        let workers = BusyWorkers::new(8, 4);
        let at = |micros| workers.epoch + Duration::from_micros(micros);
        assert!(workers.are_few(at(0)));
        for worker in 0..2 {
            workers.note_fault(worker, at(100));
            assert!(workers.are_few(at(200)));
        }
        workers.note_fault(7, at(900));
        assert!(!workers.are_few(at(2000)));
        assert!(workers.are_few(at(2200)), "the first two have had no fault for a while");
        assert!(BusyWorkers::new(2, 1).are_few(at(0)), "one always may");
    }
}
