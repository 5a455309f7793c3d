//! Pauses before the kernel is asked once more for what it would not do.

use std::time::{Duration, Instant};

/// The first pause: about what the thread that the kernel waits for takes to run again.
const FIRST: Duration = Duration::from_micros(50);

/// The longest: a VMM that is frozen while it gives memory back costs 100 wakes a second.
const LONGEST: Duration = Duration::from_millis(10);

/// The longest where memory is missing, which lasts longer: each try reads a page anew, and a hugepage is 2 MiB.
const LONGEST_MEMORY: Duration = Duration::from_millis(100);

/// The same where the template could not be read, or no thread could be had for that: what is amiss there lasts longer.
const FIRST_READ: Duration = Duration::from_millis(1);
const LONGEST_READ: Duration = Duration::from_millis(500);

/// A pause that is as long as the tries before were in vain. Made anew once one gets on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    until: Instant,
    length: Duration,
    longest: Duration,
}

impl Backoff {
    /// After the first try.
    pub(super) fn first(now: Instant) -> Self {
        Self {
            until: now + FIRST,
            length: FIRST,
            longest: LONGEST,
        }
    }

    /// After the first try to read.
    pub(super) fn first_read(now: Instant) -> Self {
        Self {
            until: now + FIRST_READ,
            length: FIRST_READ,
            longest: LONGEST_READ,
        }
    }

    /// After one more. Those of one turn count as one: only what is tried after the pause makes it longer.
    pub(super) fn lengthen(&mut self, now: Instant) {
        if self.until <= now {
            self.length = (self.length * 2).min(self.longest);
            self.until = now + self.length;
        }
    }

    /// From now on it may become as long as it is worth waiting for memory.
    pub(super) fn wait_for_memory(&mut self) {
        self.longest = LONGEST_MEMORY;
    }

    /// Something else than memory is waited for as well, and that comes sooner.
    pub(super) fn shorten(&mut self, now: Instant) {
        self.length = self.length.min(LONGEST);
        self.until = self.until.min(now + LONGEST);
    }

    /// When to try again.
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
