//! Completing a fork: once what is left has been installed, letting go.

use std::sync::Arc;

use pagecast_uffd::{Errno, Outcome};

use super::{End, Scratch, ServedFork};
use crate::server::failure::FailReason;

impl ServedFork {
    /// From now on installs everything that is left, whenever `fill` gets a turn: at the rate that is set, or `at_once`.
    pub(in crate::server) fn begin_completion(&mut self, at_once: bool) {
        self.session.begin_completion();
        // What is installed from now on does not fault, whether or not it would have been touched.
        if let Some(watched) = self.end_watch() {
            self.watched = Some(watched);
        }
        self.at_once = at_once;
        if at_once {
            // It may be one for the rate, and long where that is low.
            self.fill_pause = None;
        }
    }

    /// Nobody wants it complete any more: serves the fork as before, where it is not all but complete.
    pub(in crate::server) fn abandon_completion(&mut self) {
        if self.session.is_completing() && !self.unregistered {
            self.stop_completing();
        }
    }

    pub(super) fn give_up_completion(&mut self, reason: FailReason) {
        let reason = Arc::new(reason);
        self.given_up = Some(Arc::clone(&reason));
        self.stop_completing();
        self.record.give_up_completion(reason);
    }

    fn stop_completing(&mut self) {
        self.session.abandon_completion();
        self.drop_fills();
    }

    /// Why a completion has just been given up, once.
    pub(in crate::server) fn take_given_up(&mut self) -> Option<Arc<FailReason>> {
        self.given_up.take()
    }

    /// Everything that is not zeros is in place: lets go of the memory, and makes sure that nobody waits for us.
    ///
    /// Unregistering wakes who waits for a page. It does not wake a thread that is about to report a removal: that
    /// thread waits until its event is read, and would for ever once we are gone. No new removal can begin after all is
    /// unregistered, and while one is under way the kernel answers every install with `Retry`; so one more install, at
    /// a place where nothing is registered, tells when it is over.
    pub(super) fn unregister(&mut self, scratch: &mut Scratch) -> Result<(), End> {
        if !self.unregistered {
            let mut regions = self.session.regions().iter();
            let refused = regions.find_map(|(_, region)| self.uffd.unregister(region.memory()).err());
            drop(regions);
            if let Some(errno) = refused {
                return self.on_refused_unregister(errno);
            }
            self.unregistered = true;
            self.fill_retry = None;
        }
        self.serve(false, scratch)?;
        let Some(first_page) = self.session.regions().first_page() else {
            return Err(End::Complete);
        };
        match self.uffd.zeropage(first_page) {
            Outcome::NotRegistered => Err(End::Complete),
            Outcome::Retry { .. } => {
                self.pause_filling();
                Ok(())
            }
            Outcome::PeerGone => Err(End::PeerGone),
            _ => {
                self.unregistered = false;
                self.give_up_completion(FailReason::RegisteredAgain);
                Ok(())
            }
        }
    }

    /// Unregistering answers `ENOMEM` for lack of memory, for too many mappings and for an address space that is gone,
    /// and a large VMM is gone for long before its process has exited. Only an install tells them apart. This one does
    /// nothing where the address space is there: guest memory is private, and has nothing to continue with.
    fn on_refused_unregister(&mut self, errno: Errno) -> Result<(), End> {
        let first_page = self.session.regions().first_page();
        match first_page.map(|page| self.uffd.continue_range(page)) {
            Some(Outcome::PeerGone) => Err(End::PeerGone),
            Some(Outcome::Retry { .. }) => {
                self.pause_filling();
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
