//! Pauses between the tries of an operation that the kernel or the template refused.

use std::time::{Duration, Instant};

/// The first pause: about the time until the thread that the kernel waits for runs again.
const FIRST: Duration = Duration::from_micros(50);

/// The longest pause: a VMM that is frozen while it gives memory back costs 100 wakes a second.
const LONGEST: Duration = Duration::from_millis(10);

/// The longest pause if memory is missing, which lasts longer: each try reads a page anew, and a hugepage is 2 MiB.
const LONGEST_MEMORY: Duration = Duration::from_millis(100);

/// The first and longest pause if the template could not be read, or no thread started for that: such problems last
/// longer.
const FIRST_READ: Duration = Duration::from_millis(1);
const LONGEST_READ: Duration = Duration::from_millis(500);

/// A pause that grows with each failed try. A new one is made after a success.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    until: Instant,
    length: Duration,
    longest: Duration,
}

impl Backoff {
    /// The pause after the first failed try.
    pub(super) fn first(now: Instant) -> Self {
        Self {
            until: now + FIRST,
            length: FIRST,
            longest: LONGEST,
        }
    }

    /// The pause after the first failed read.
    pub(super) fn first_read(now: Instant) -> Self {
        Self {
            until: now + FIRST_READ,
            length: FIRST_READ,
            longest: LONGEST_READ,
        }
    }

    /// Lengthens the pause after another failed try. Several failures in one turn count as one: only tries after the
    /// pause make it longer.
    pub(super) fn lengthen(&mut self, now: Instant) {
        if self.until <= now {
            self.length = (self.length * 2).min(self.longest);
            self.until = now + self.length;
        }
    }

    /// Raises the limit of the pause to the one for missing memory.
    pub(super) fn wait_for_memory(&mut self) {
        self.longest = LONGEST_MEMORY;
    }

    /// Limits the pause again: something besides memory is awaited, and comes sooner.
    pub(super) fn shorten(&mut self, now: Instant) {
        self.length = self.length.min(LONGEST);
        self.until = self.until.min(now + LONGEST);
    }

    /// The time of the next try.
    pub(super) fn until(&self) -> Instant {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_grows_until_there_are_a_hundred_a_second() {
        let begun = Instant::now();
        let mut backoff = Backoff::first(begun);
        // Others of the same turn.
        backoff.lengthen(begun);
        assert_eq!(backoff.until() - begun, FIRST);
        let mut now = begun;
        let mut tries = 0;
        while now < begun + Duration::from_secs(1) {
            let before = backoff.until();
            now = before;
            backoff.lengthen(now);
            assert!(backoff.until() - now <= LONGEST);
            tries += 1;
        }
        assert!((100..=120).contains(&tries), "{tries} tries in a second");
    }

    #[test]
    fn a_pause_for_memory_grows_further_and_is_short_again_where_something_else_is_waited_for() {
        let mut now = Instant::now();
        let mut backoff = Backoff::first(now);
        backoff.wait_for_memory();
        for _ in 0..20 {
            now = backoff.until();
            backoff.lengthen(now);
        }
        assert_eq!(backoff.until() - now, LONGEST_MEMORY);
        backoff.shorten(now);
        assert_eq!(backoff.until() - now, LONGEST);
        // Only for as long as that is waited for.
        now = backoff.until();
        backoff.lengthen(now);
        assert_eq!(backoff.until() - now, 2 * LONGEST);
    }
}
