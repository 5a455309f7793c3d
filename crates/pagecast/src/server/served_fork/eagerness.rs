//! Whether to look for the next fault of a fork before sleeping.

/// A look that finds nothing costs half of what one saves that finds a fault: it is worth it where one in three does.
const FOUND: u8 = 2;
const MOST: u8 = 8;

/// Where it is not, one in so many is tried all the same.
const PROBE: u8 = 32;

/// What looking for a fault right after one was answered has come to lately.
///
/// Where the kernel lets a vCPU run as soon as its page is there, on the core of the worker, its next fault is there when the
/// worker runs again, and reading it at once saves an `epoll_wait`. Where the vCPU runs on another core, it never is.
#[derive(Debug, Default)]
pub(super) struct Eagerness {
    score: u8,
    since_probe: u8,
}

impl Eagerness {
    /// Whether to look.
    pub(super) fn is_worth_a_look(&mut self) -> bool {
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
        let mut eagerness = Eagerness::default();
        let mut looks = 0;
        for _ in 0..320 {
            if eagerness.is_worth_a_look() {
                looks += 1;
                eagerness.note(looks % n == 0);
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
