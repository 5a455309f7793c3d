//! Completing a fork: once the rest is installed, its memory is unregistered.

use std::sync::Arc;

use pagecast_uffd::{Errno, Outcome};

use super::{End, Scratch, ServedFork};
use crate::server::fork::{FailReason, ForkEvent};
use crate::session::Completion;

impl ServedFork {
    /// Begins to install everything that is left, whenever `fill` gets a turn: at the configured rate, or `at_once`.
    pub(in crate::server::worker) fn begin_completion(&mut self, at_once: bool) {
        self.session.begin_completion(at_once);
        // Pages installed from now on do not fault, so later faults say nothing about the working set.
        self.end_first_faults();
        if at_once {
            // The pause may be one for the rate, and long if the rate is low.
            self.fill.end_pause();
        }
    }

    /// Ends a completion that is no longer requested: serves the fork as before, unless it is unregistered already.
    pub(in crate::server::worker) fn abandon_completion(&mut self) {
        if self
            .session
            .completion()
            .is_some_and(|completion| !completion.is_unregistered)
        {
            self.stop_completing();
        }
    }

    /// Gives up the completion because of `reason`. The fork is served as before.
    pub(super) fn give_up_completion(&mut self, reason: FailReason) {
        let reason = Arc::new(reason);
        self.stop_completing();
        self.record.give_up_completion(Arc::clone(&reason));
        self.context.registry.observe(ForkEvent::NotCompleted {
            id: self.record.id.clone(),
            reason,
        });
    }

    fn stop_completing(&mut self) {
        self.session.abandon_completion();
        self.drop_fills();
    }

    /// Unregisters the memory once all pages but zeros are installed, and ensures that no thread waits for us.
    ///
    /// Unregistering wakes threads that wait for a page. It does not wake a thread that is about to report a removal:
    /// that thread waits until its event is read, and without us would wait for ever. No removal can begin after all is
    /// unregistered, and while one is under way the kernel answers every install with `Retry`. So one more install, at
    /// a place where nothing is registered, shows when it is over.
    pub(super) fn unregister(&mut self, completion: Completion, scratch: &mut Scratch) -> Result<(), End> {
        if !completion.is_unregistered {
            let mut regions = self.session.regions();
            let refused = regions.find_map(|region| self.uffd.unregister(region.memory()).err());
            drop(regions);
            if let Some(errno) = refused {
                return self.on_refused_unregister(errno);
            }
            self.session.set_unregistered();
            self.fill.end_retry();
        }
        self.serve(false, scratch)?;
        let Some(first_page) = self.session.first_page() else {
            return Err(End::Complete);
        };
        match self.uffd.zeropage(first_page) {
            Outcome::NotRegistered => Err(End::Complete),
            Outcome::Retry { .. } => {
                self.fill.pause_for_retry();
                Ok(())
            }
            Outcome::PeerGone => Err(End::PeerGone),
            _ => {
                self.give_up_completion(FailReason::RegisteredAgain);
                Ok(())
            }
        }
    }

    /// Handles an error of unregistering. The kernel returns `ENOMEM` for lack of memory, for too many mappings and for
    /// an address space that is gone. The address space of a large VMM is gone long before its process has exited.
    /// Only an install tells these apart. The one used here does nothing if the address space exists: guest memory is
    /// private, and has nothing to continue with.
    fn on_refused_unregister(&mut self, errno: Errno) -> Result<(), End> {
        let first_page = self.session.first_page();
        match first_page.map(|page| self.uffd.continue_range(page)) {
            Some(Outcome::PeerGone) => Err(End::PeerGone),
            Some(Outcome::Retry { .. }) => {
                self.fill.pause_for_retry();
                Ok(())
            }
            _ => {
                self.give_up_completion(FailReason::Kernel {
                    operation: "unregister a region",
                    errno,
                });
                Ok(())
            }
        }
    }
}
