//! Whether to look for the next fault of a fork before sleeping.

/// A look that finds nothing costs half of what a look saves that finds a fault: looking is worth it if one in three does.
const FOUND: u8 = 2;
const MOST: u8 = 8;

/// One look in so many is taken even if it is not worth it.
const PROBE: u8 = 32;

/// How often a look for the next fault, right after one was answered, has found one lately.
///
/// Where the kernel lets a vCPU run as soon as its page is there, on the core of the worker, its next fault is there when the
/// worker runs again, and reading it at once saves an `epoll_wait`. Where the vCPU runs on another core, it never is.
#[derive(Debug, Default)]
pub(super) struct LookAgain {
    score: u8,
    since_probe: u8,
}

impl LookAgain {
    /// Whether to look.
    pub(super) fn is_worth_it(&mut self) -> bool {
        if self.score > 0 {
            return true;
        }
        self.since_probe = (self.since_probe + 1) % PROBE;
        self.since_probe == 0
    }

    /// What a look has come to.
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

    /// How many of 320 looks are taken where every `n`th finds something.
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
