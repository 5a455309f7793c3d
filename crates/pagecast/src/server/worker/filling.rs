//! The choice of the thread that carries out the next step of filling a fork: the worker, or its filler.

use std::sync::Arc;

use super::filler::{Filler, Job};
use super::served_fork::ServedFork;
use super::{Served, Worker};

impl Worker {
    /// Carries out one bounded step of filling one fork, or has the filler do so. Faults come first: the next check for
    /// them is never far.
    pub(super) fn fill_one(&mut self) {
        if self.filler_is_busy {
            return;
        }
        let forks = &self.forks;
        let next = self
            .needs_turn
            .next_to_fill(|slot| forks.get(slot).is_some_and(Served::wants_to_fill));
        let Some(slot) = next else { return };
        // Without another fork, this step holds up none.
        if self.forks.len() > 1 && self.filler().is_some() {
            self.fill_elsewhere(slot);
        } else {
            self.step(slot, ServedFork::fill);
        }
    }

    fn filler(&self) -> Option<&Filler> {
        let start = || Filler::start(self.index, Arc::clone(&self.context));
        self.filler.get_or_init(start).as_ref()
    }

    /// Makes the filler carry out the next step of a fork.
    fn fill_elsewhere(&mut self, index: usize) {
        let Some(slot) = self.forks.get(index).map(|served| served.fork.slot) else {
            return;
        };
        let mut begun = None;
        self.step(index, |fork, scratch| {
            begun = fork.begin_fill_elsewhere(scratch)?;
            Ok(())
        });
        let (Some((step, interrupt)), Some(filler)) = (begun, self.filler()) else {
            return;
        };
        match filler.fill(Job { slot, step, interrupt }) {
            Ok(()) => self.filler_is_busy = true,
            // The filler has panicked, which was reported.
            Err(Job { step, .. }) => {
                let context = Arc::clone(&self.context);
                let outcome = step.carry_out(&context.fill_pool.take_free(), &context.zeros, || false);
                self.step(index, |fork, scratch| fork.on_filled(outcome, scratch));
            }
        }
    }
}
