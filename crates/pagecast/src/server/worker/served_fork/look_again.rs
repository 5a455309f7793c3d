//! The decision whether to check for the next fault of a fork before sleeping.

/// A check that finds no fault costs half of what one that finds a fault saves: checks pay off if one in three finds
/// one.
const FOUND: u8 = 2;
const MOST: u8 = 8;

/// One check in this many is made even if it does not pay off.
const PROBE: u8 = 32;

/// How often a check for the next fault, right after an answer, has found one lately.
///
/// If the kernel runs the vCPU at once, on the core of the worker, its next fault is there when the worker runs again.
/// Reading it at once saves an `epoll_wait`. If the vCPU runs on another core, the fault is never there yet.
#[derive(Debug, Default)]
pub(super) struct LookAgain {
    score: u8,
    since_probe: u8,
}

impl LookAgain {
    /// Returns `true` if a check should be made.
    pub(super) fn is_worth_it(&mut self) -> bool {
        if self.score > 0 {
            return true;
        }
        self.since_probe = (self.since_probe + 1) % PROBE;
        self.since_probe == 0
    }

    /// Notes the result of a check.
    pub(super) fn note(&mut self, found: bool) {
        self.score = if found {
            (self.score + FOUND).min(MOST)
        } else {
            self.score.saturating_sub(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of checks made, of 320, if every `n`th finds a fault.
    fn looks(n: usize) -> usize {
        let mut look_again = LookAgain::default();
        let mut looks = 0;
        for _ in 0..320 {
            if look_again.is_worth_it() {
                looks += 1;
                look_again.note(looks % n == 0);
            }
        }
        looks
    }

    #[test]
    fn looks_are_taken_while_they_find_something() {
        assert_eq!(looks(usize::MAX), 10, "probes only");
        assert!(looks(1) > 280);
        assert!(looks(2) > looks(8));
    }
}
