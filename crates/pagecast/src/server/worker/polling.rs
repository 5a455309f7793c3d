//! The decision whether to look for the next fault without sleeping.
//!
//! Waking a thread on another core takes longer than answering a fault, so a worker that looks for the next fault while the
//! vCPU runs answers it sooner. But such a worker uses its core in full. So it polls only while that finds faults, while no
//! other thread wants its core, and for a bounded part of the time.

use std::time::{Duration, Instant};

use pagecast_uffd::thread_usage::involuntary_switches;

/// After this many polls without success, only one fault in `RAREST` + 1 is followed by a poll.
const RAREST: u32 = 1023;

/// The polls of the last `WATCHED` show whether another thread wants the core. If one does, no poll follows for a
/// while, for longer each time.
const WATCHED: Duration = Duration::from_millis(10);
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The CPU time for polls: at most `BURST` at once, and a quarter of the time after that.
const BURST: Duration = Duration::from_millis(500);
const TIME_PER_CPU_TIME: u32 = 4;

/// The polls of one worker.
#[derive(Debug)]
pub(super) struct Polling {
    /// The longest poll.
    most: Duration,
    /// The beginning of the current poll.
    begun: Option<Instant>,
    /// The faults to be followed by no poll.
    skip: u32,
    skipped: u32,
    /// When and with which count the switches of this thread were last looked at.
    watched: Option<(Instant, u64)>,
    pause: Duration,
    paused_until: Option<Instant>,
    left: Duration,
    refilled: Instant,
}

impl Polling {
    /// Creates polls of at most this time; none if that is zero.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most,
            begun: None,
            skip: 0,
            skipped: 0,
            watched: None,
            pause: SHORTEST_PAUSE,
            paused_until: None,
            left: BURST,
            refilled: Instant::now(),
        }
    }

    /// Begins a poll after a fault was answered, if that is worth it.
    pub(super) fn after_fault(&mut self) {
        if self.most.is_zero() {
            return;
        }
        if self.skipped < self.skip {
            self.skipped += 1;
            return;
        }
        self.skipped = 0;
        self.begin(Instant::now(), involuntary_switches);
    }

    fn begin(&mut self, now: Instant, switches: impl Fn() -> u64) {
        if self.paused_until.is_some_and(|until| now < until) {
            return;
        }
        if self.paused_until.take().is_some() {
            self.watched = None;
        }
        let time = now.duration_since(self.refilled);
        self.refilled = now;
        self.left = (self.left + time / TIME_PER_CPU_TIME).min(BURST);
        if self.left < self.most {
            return;
        }
        let count = switches();
        match self.watched {
            Some((_, before)) if before != count => {
                self.watched = None;
                self.paused_until = Some(now + self.pause);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                return;
            }
            Some((since, _)) if now.duration_since(since) < WATCHED => {}
            Some(_) => {
                self.pause = (self.pause / 2).max(SHORTEST_PAUSE);
                self.watched = Some((now, count));
            }
            None => self.watched = Some((now, count)),
        }
        self.begun = Some(now);
    }

    /// Returns `true` if the worker must not sleep now.
    pub(super) fn is_due(&mut self) -> bool {
        let Some(begun) = self.begun else { return false };
        let time = begun.elapsed();
        if time < self.most {
            return true;
        }
        self.end(time);
        self.skip = (self.skip * 2 + 1).min(RAREST);
        false
    }

    /// Notes that there was an event: the poll was worth it.
    pub(super) fn found(&mut self) {
        if let Some(begun) = self.begun {
            self.end(begun.elapsed());
            self.skip /= 2;
        }
    }

    fn end(&mut self, time: Duration) {
        self.begun = None;
        self.left = self.left.saturating_sub(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    /// A poll that is begun at `at`.
    fn begins(polling: &mut Polling, at: Instant, switches: u64) -> bool {
        polling.begin(at, || switches);
        polling.begun.take().is_some()
    }

    #[test]
    fn without_time_there_is_no_poll() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.after_fault();
        assert!(!polling.is_due());
    }

    #[test]
    fn fruitless_polls_become_rare_and_successful_ones_frequent() {
        let mut polling = Polling::new(Duration::from_nanos(1));
        let mut polls = 0;
        for _ in 0..10_000 {
            polling.after_fault();
            if polling.begun.is_some() {
                polls += 1;
                while polling.is_due() {}
            }
        }
        assert!(polls < 30, "{polls}");
        polling.most = Duration::from_millis(100);
        let mut faults = 0;
        while polling.skip > 0 {
            polling.after_fault();
            polling.found();
            faults += 1;
        }
        assert!(faults < 3 * RAREST, "{faults}");
    }

    #[test]
    fn a_thread_that_wants_the_core_ends_polls_for_ever_longer() {
        let mut polling = Polling::new(MOST);
        let mut at = Instant::now();
        assert!(begins(&mut polling, at, 5) && begins(&mut polling, at, 5));
        for pause in [1, 2, 4] {
            let pause = Duration::from_millis(pause);
            assert!(!begins(&mut polling, at, 6), "it was switched off");
            assert!(!begins(&mut polling, at + pause.saturating_sub(MOST), 6));
            at += pause;
            assert!(begins(&mut polling, at, 5), "whatever came meanwhile");
        }
        // A quiet time shortens the pause again.
        for _ in 0..5 {
            at += WATCHED;
            assert!(begins(&mut polling, at, 5));
        }
        assert_eq!(polling.pause, SHORTEST_PAUSE);
    }

    #[test]
    fn polls_take_a_bounded_part_of_the_time() {
        let mut polling = Polling::new(MOST);
        let (start, mut at, mut polled) = (Instant::now(), Instant::now(), Duration::ZERO);
        while at < start + Duration::from_secs(10) {
            if begins(&mut polling, at, 0) {
                polled += MOST;
                polling.end(MOST);
            }
            at += MOST;
        }
        assert!(polled <= BURST + Duration::from_millis(2510), "{polled:?}");
        assert!(polled >= Duration::from_millis(2490), "{polled:?}");
    }
}
