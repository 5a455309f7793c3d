//! Completing a fork: installing what is left, then letting go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecast_uffd::{Errno, Outcome};

use super::{Awaited, End, FIRST_PAUSE, Scratch, ServedFork, room};
use crate::server::failure::FailReason;
use crate::session::FillRun;
use crate::template::{Page, SourceError, leading_zero_pages};

impl ServedFork {
    /// From now on installs everything that is left, whenever [`fill`](Self::fill) gets a turn.
    pub(in crate::server) fn begin_completion(&mut self) {
        self.session.begin_completion();
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
        self.fill_pause = None;
        // Their bytes are not for the completion that may follow, which begins elsewhere; nor does anybody wait for
        // them.
        self.reads.retain(|read| matches!(read.awaited, Awaited::Fault(_)));
    }

    /// Why a completion has just been given up, once.
    pub(in crate::server) fn take_given_up(&mut self) -> Option<Arc<FailReason>> {
        self.given_up.take()
    }

    /// Whether [`fill`](Self::fill) has something to do.
    pub(in crate::server) fn wants_to_fill(&self) -> bool {
        self.session.is_completing()
            && self.fill_pause.is_none()
            && !self.reads.iter().any(|read| matches!(read.awaited, Awaited::Fill(_)))
    }

    /// The next bounded step of a completion.
    pub(in crate::server) fn fill(&mut self, scratch: &mut Scratch) -> Result<(), End> {
        let Some(run) = self.session.next_fill() else {
            return if self.session.is_completing() {
                self.unregister(scratch)
            } else {
                Ok(())
            };
        };
        let template = self.template.clone();
        let buffer = room(&mut scratch.bytes, run.bytes());
        let page = match template.source().try_read(run.from, buffer) {
            Ok(page) => page,
            Err(error) => return self.on_unreadable_fill(error),
        };
        if page == Page::NotReady {
            self.read_later(Awaited::Fill(run), run.from, run.bytes(), &scratch.deliver);
            return Ok(());
        }
        template.source().check_unchanged()?;
        self.fill_run(&run, page, scratch.fault_deadline)
    }

    /// Nobody waits for what a completion reads, so where it merely cannot be read nobody has to die for it.
    pub(super) fn on_unreadable_fill(&mut self, error: SourceError) -> Result<(), End> {
        match error {
            SourceError::Io { .. } => {
                self.give_up_completion(FailReason::Template(error));
                Ok(())
            }
            // A template that is not what it was has no more bytes for anybody.
            SourceError::Changed { .. } | SourceError::Truncated { .. } => Err(error.into()),
        }
    }

    pub(super) fn fill_run(&mut self, run: &FillRun, page: Page<'_>, deadline: Duration) -> Result<(), End> {
        while self.fill_pause.is_none()
            && let Some(part) = self.session.fill_part(run)
        {
            let Page::Bytes(bytes) = page else {
                self.session.skip_fill(&part);
                continue;
            };
            let start = run.position_of(&part);
            let bytes = bytes.get(start..start + part.bytes()).unwrap_or_default();
            let (zeros, pages) = leading_zero_pages(bytes, part.page_size);
            let part = part.truncated(pages);
            if zeros {
                self.session.skip_fill(&part);
                continue;
            }
            let bytes = bytes.get(..part.bytes()).unwrap_or_default();
            let tried = self.copy(part.to, bytes);
            let since = tried.begun;
            self.finish(&part, tried, since, deadline)?;
        }
        Ok(())
    }

    /// Everything that is not zeros is in place: lets go of the memory, and makes sure that nobody waits for us.
    ///
    /// Unregistering wakes who waits for a page. It does not wake a thread that is about to report a removal: that
    /// thread waits until its event is read, and would for ever once we are gone. No new removal can begin after all is
    /// unregistered, and while one is under way the kernel answers every install with `Retry`; so one more install, at
    /// a place where nothing is registered, tells when it is over.
    fn unregister(&mut self, scratch: &mut Scratch) -> Result<(), End> {
        if !self.unregistered {
            let mut regions = self.session.regions().iter();
            let refused = regions.find_map(|(_, region)| self.uffd.unregister(region.memory()).err());
            drop(regions);
            if let Some(errno) = refused {
                return self.on_refused_unregister(errno);
            }
            self.unregistered = true;
        }
        self.serve(scratch)?;
        let Some(first_page) = self.session.regions().first_page() else {
            return Err(End::Complete);
        };
        match self.uffd.zeropage(first_page) {
            Outcome::NotRegistered => Err(End::Complete),
            Outcome::Retry { .. } => {
                self.fill_pause = Some(Instant::now() + FIRST_PAUSE);
                Ok(())
            }
            Outcome::PeerGone => Err(End::PeerGone),
            _ => {
                self.unregistered = false;
                self.give_up_completion(FailReason::Kernel {
                    operation: "unregister a region for good: the VMM registered it again",
                    errno: Errno::new(0),
                });
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
                self.fill_pause = Some(Instant::now() + FIRST_PAUSE);
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
