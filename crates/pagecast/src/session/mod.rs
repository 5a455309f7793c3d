//! One fork's state machine: events and outcomes in, steps out. No I/O and no clock.
//!
//! The driver of a [`Session`] first reads **all** events of the kernel and hands them to [`Session::on_event`], which
//! applies removals at once and queues faults. It then takes [`Session::next_step`] until there is none, carries out
//! each step, and reports the outcome with [`Session::on_outcome`]. A fault that the kernel asks to retry is parked
//! until the driver calls [`Session::release_parked`], after a pause of its choice. A fault whose bytes are not there
//! yet waits for [`Session::bytes_ready`].
//!
//! [`Session::next_fill`] hands out pages that no thread waits for (a prefault, a completion), piece by piece.
//! [`Session::fill_parts`] returns the parts of a piece that are still absent, and [`Session::on_filled`] notes the
//! outcome. Long runs of zeros need not be installed at all: [`Session::next_give_back`].

mod fault_around;
mod filling;
mod give_back;
mod page_states;
mod region;
mod step;
mod tracked_region;

use std::collections::VecDeque;
use std::sync::Arc;

use pagecast_uffd::{Event, FaultFlags, HostRange, Outcome, PageFault};

use crate::page::PageIndex;
use crate::template::{PrefaultPlan, TemplateOffset, ZeroRuns};
use fault_around::Ahead;
use filling::Filling;
pub(crate) use filling::{Completion, Fill};
use give_back::GiveBack;
pub(crate) use give_back::ZeroRange;
use page_states::{PageState, PageStates};
pub(crate) use region::{Region, RegionIndex, RegionMap};
pub use step::Violation;
pub(crate) use step::{After, Content, Install, Noted, PageRef, Step};
use tracked_region::TrackedRegion;

/// The most faults in a row of an installed page before it counts as lost. Threads that fault at once make a few; no
/// VMM has this many.
const MOST_REPEATS: u32 = 4096;

/// One fork's regions, the state of each page, and the faults that wait for an answer.
#[derive(Debug)]
pub(crate) struct Session {
    regions: RegionMap<TrackedRegion>,
    /// Faults to answer next.
    ready: VecDeque<PageRef>,
    /// Faults that the kernel did not let us answer yet.
    parked: Vec<PageRef>,
    /// The page that last faulted though installed, and how often in a row.
    repeated: Option<(PageRef, u32)>,
    /// The window of the fault that was answered last, as far as it is not installed.
    ahead: Option<Ahead>,
    filling: Filling,
    give_back: GiveBack,
}

impl Session {
    /// Creates the session of a fork with these regions. No page is installed yet.
    pub(crate) fn new(regions: RegionMap) -> Self {
        Self {
            regions: regions.into_each(),
            ready: VecDeque::new(),
            parked: Vec::new(),
            repeated: None,
            ahead: None,
            filling: Filling::default(),
            give_back: GiveBack::default(),
        }
    }

    /// The regions of the fork.
    pub(crate) fn regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter().map(|(_, tracked)| &tracked.region)
    }

    /// The first page of the first region, as memory of the VMM; `None` if there is no region.
    pub(crate) fn first_page(&self) -> Option<HostRange> {
        self.regions.first_page()
    }

    /// Notes an event: queues a fault, applies a removal.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the fork cannot be served any longer.
    pub(crate) fn on_event(&mut self, event: &Event) -> Result<Noted, Violation> {
        match event {
            Event::PageFault(fault) => self.on_fault(fault),
            Event::Remove(range) => Ok(Noted::Removed {
                pages: self.on_remove(*range),
            }),
            Event::Unmap(_) => Err(Violation::UnexpectedEvent { what: "an unmap" }),
            Event::Remap { .. } => Err(Violation::UnexpectedEvent { what: "a remap" }),
            Event::Unknown(_) => Err(Violation::UnexpectedEvent { what: "an unknown one" }),
            _ => Err(Violation::UnexpectedEvent { what: "a fork" }),
        }
    }

    fn on_fault(&mut self, fault: &PageFault) -> Result<Noted, Violation> {
        let PageFault { address, flags, .. } = *fault;
        if !FaultFlags::WRITE.contains(flags) {
            return Err(Violation::NotMissing { address, flags });
        }
        let (region, page) = self.regions.find(address).ok_or(Violation::FaultOutside { address })?;
        let at = PageRef { region, page };
        let Some(TrackedRegion { region, states, .. }) = self.regions.get(region) else {
            return Err(Violation::FaultOutside { address });
        };
        if states.is_waiting(page) {
            return Ok(Noted::SameFault);
        }
        self.ready.push_back(at);
        Ok(Noted::Fault {
            offset: region.offset_of(page),
            page_size: region.page_size(),
        })
    }

    fn on_remove(&mut self, range: HostRange) -> usize {
        let mut removed = 0;
        for TrackedRegion { region, states, .. } in self.regions.iter_mut() {
            if let Some((first, count)) = region.pages_within(range) {
                states.set_removed(first, count);
                removed += count;
            }
        }
        removed
    }

    /// The next fault to answer, if any.
    ///
    /// # Errors
    ///
    /// [`Violation::PageLost`].
    pub(crate) fn next_step(&mut self) -> Result<Option<Step>, Violation> {
        while let Some(at) = self.ready.pop_front() {
            let Some(TrackedRegion { region, states, .. }) = self.regions.get(at.region) else {
                continue;
            };
            // The answer to the waiting fault also wakes the thread of this one.
            if states.is_waiting(at.page) {
                continue;
            }
            let content = match states.get(at.page) {
                PageState::Absent => Content::Template(region.offset_of(at.page)),
                PageState::Removed => Content::Zeros,
                PageState::Installed => {
                    let range = region.range_of(at.page, 1);
                    self.count_repeat(at, range)?;
                    return Ok(Some(Step::Wake(range)));
                }
            };
            return Ok(Some(Step::Install(Install {
                at,
                pages: 1,
                to: region.range_of(at.page, 1),
                page_size: region.page_size(),
                content,
            })));
        }
        Ok(None)
    }

    /// Notes that the template's bytes for this install are not there yet: it waits for
    /// [`bytes_ready`](Self::bytes_ready).
    pub(crate) fn await_bytes(&mut self, install: &Install) {
        self.set_waiting(install.at);
    }

    /// Returns the step for a page whose bytes are there now. The page may have been removed meanwhile, and then gets
    /// zeros. Or it was installed, and then needs a wake.
    ///
    /// # Errors
    ///
    /// [`Violation::PageLost`].
    pub(crate) fn bytes_ready(&mut self, at: PageRef) -> Result<Option<Step>, Violation> {
        self.clear_waiting(at);
        self.ready.push_front(at);
        self.next_step()
    }

    /// Notes the outcome of an install for a demand fault.
    pub(crate) fn on_outcome(&mut self, install: &Install, outcome: Outcome) -> After {
        let at = install.at;
        match outcome {
            Outcome::Installed => {
                self.repeated = None;
                self.set_installed(at, 1);
                After::Done
            }
            Outcome::AlreadyPresent => {
                self.set_installed(at, 1);
                After::Wake(install.to)
            }
            // Unmapped meanwhile: a waiting thread is woken and finds out by touching it again.
            Outcome::NotRegistered => After::Wake(install.to),
            Outcome::Retry { .. } => {
                self.park(at);
                After::Parked
            }
            Outcome::OutOfMemory => {
                self.park(at);
                After::OutOfMemory
            }
            Outcome::PeerGone => After::PeerGone,
            Outcome::Failed(errno) => After::Failed(errno),
        }
    }

    /// Plans fault-around for the fault that `fault` answers. Returns the page and its neighbours, if these are to be
    /// installed with it; [`next_ahead`](Self::next_ahead) has the rest. A window has at most `most` pages, all of them absent, and
    /// those only for which `is_wanted` returns `true`.
    pub(crate) fn plan_around(
        &mut self,
        fault: &Install,
        most: usize,
        is_wanted: impl Fn(TemplateOffset) -> bool,
    ) -> Option<Install> {
        let TrackedRegion { region, states, around } = self.regions.get_mut(fault.at.region)?;
        let around = around.get_or_insert_default();
        // Faults of other pages say little about those around them.
        let Content::Template(from) = fault.content else {
            return None;
        };
        let window = around.on_fault(fault.at.page, is_wanted(from), most)?;
        let mut ahead = Ahead::new(fault.at.region, window, |page| {
            states.is_absent(page) && is_wanted(region.offset_of(page))
        });
        // Pages that are there already cannot fault.
        let next = (window.pages..window.pages + fault_around::MOST_PAGES)
            .map_while(|place| window.page(place).filter(|page| page.get() < region.pages()))
            .find(|page| states.is_absent(*page));
        around.on_planned(&ahead, next);
        let first = ahead.take().map(|pages| template_pages(fault.at.region, region, pages));
        self.ahead = Some(ahead);
        first.filter(|first| first.pages > 1)
    }

    /// The next pages of the window that was planned last, to be installed after its fault was answered.
    pub(crate) fn next_ahead(&mut self) -> Option<Install> {
        let ahead = self.ahead.as_mut()?;
        let Some(pages) = ahead.take() else {
            self.ahead = None;
            return None;
        };
        let region = &self.regions.get(ahead.region)?.region;
        Some(template_pages(ahead.region, region, pages))
    }

    /// Gives up the rest of the window: its bytes are not at hand.
    pub(crate) fn give_up_ahead(&mut self) {
        self.ahead = None;
    }

    /// Notes the outcome of installing pages of a window. Returns the number of pages that were installed. If these are
    /// not all, the rest of the window is given up.
    pub(crate) fn on_ahead(&mut self, install: &Install, outcome: Outcome) -> usize {
        if outcome == Outcome::Installed {
            self.repeated = None;
        }
        let pages = match outcome {
            Outcome::Installed => install.pages,
            Outcome::Retry { installed } => filling::pages_of(installed, install.page_size),
            _ => 0,
        };
        self.set_installed(install.at, pages);
        if pages < install.pages {
            self.ahead = None;
        }
        if outcome == Outcome::OutOfMemory
            && let Some(around) = self
                .regions
                .get_mut(install.at.region)
                .and_then(|tracked| tracked.around.as_mut())
        {
            around.pause();
        }
        pages
    }

    /// Returns `true` if a fault waits for a retry.
    pub(crate) fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Queues all parked faults for another try.
    pub(crate) fn release_parked(&mut self) {
        for at in std::mem::take(&mut self.parked) {
            self.clear_waiting(at);
            self.ready.push_back(at);
        }
    }

    /// Begins to prefault this working set. If a completion is under way too, the working set comes first.
    pub(crate) fn begin_working_set(&mut self, plan: Arc<PrefaultPlan>) {
        self.filling.begin_working_set(plan);
    }

    /// Begins to prefault all pages, after everything else. The fork stays served.
    pub(crate) fn begin_all(&mut self) {
        self.filling.begin_all();
    }

    /// Ends prefaulting, but not a completion.
    pub(crate) fn stop_prefault(&mut self) {
        self.filling.stop_prefault();
    }

    /// Begins to complete the fork. If that has begun, only sets whether it is done `at_once`.
    pub(crate) fn begin_completion(&mut self, at_once: bool) {
        self.filling.begin_completion(at_once);
    }

    /// Notes that all regions were unregistered, to complete the fork.
    pub(crate) fn set_unregistered(&mut self) {
        self.filling.set_unregistered();
    }

    /// Abandons the completion; the fork is served as before. Installed pages stay.
    pub(crate) fn abandon_completion(&mut self) {
        self.filling.abandon_completion();
    }

    /// The completion that was begun and not abandoned.
    pub(crate) fn completion(&self) -> Option<Completion> {
        self.filling.completion()
    }

    /// Returns `true` if [`next_fill`](Self::next_fill) or [`next_give_back`](Self::next_give_back) may have something
    /// left.
    pub(crate) fn wants_to_fill(&self) -> bool {
        self.filling.is_wanted() || !self.give_back.is_done()
    }

    /// The next piece to fill. Each is returned once: a piece that is not carried to its end is lost to this prefault
    /// or completion. `None` if everything has been handed out. Once all pieces are carried out, a fork that is being
    /// completed can be unregistered.
    pub(crate) fn next_fill(&mut self) -> Option<Fill> {
        self.filling.next(&self.regions)
    }

    /// The parts of this piece that are still to be installed, in ascending order. Empty once the piece is at its end.
    pub(crate) fn fill_parts(&self, fill: &Fill) -> Vec<Install> {
        let Some(TrackedRegion { region, states, .. }) = self.regions.get(fill.region) else {
            return Vec::new();
        };
        let mut parts = Vec::new();
        let mut from = fill.next;
        while from < fill.end {
            let most = if fill.single_pages {
                1
            } else {
                fill.end.get() - from.get()
            };
            let Some((first, pages)) = states.next_absent(from, most).filter(|(first, _)| *first < fill.end) else {
                break;
            };
            let pages = pages.min(fill.end.get() - first.get());
            from = PageIndex::new(first.get() + pages);
            parts.push(template_pages(fill.region, region, (first, pages)));
        }
        parts
    }

    /// Notes the outcome of installing a part of a piece. Returns how many pages are there now, and what is left to do.
    pub(crate) fn on_filled(&mut self, fill: &mut Fill, part: &Install, outcome: Outcome) -> (usize, After) {
        let (present, after) = fill.on_outcome(part, outcome);
        self.set_installed(part.at, present);
        (present, after)
    }

    /// Begins to leave these runs of zeros of the template to the kernel, which fills them in pages of 4 KiB. A
    /// completion leaves zeros to the kernel from now on, too.
    pub(crate) fn begin_give_back(&mut self, zeros: ZeroRuns) {
        self.filling.set_kernel_fills_small();
        self.give_back = GiveBack::new(zeros);
    }

    /// The next range that can be unregistered: its pages are zeros either way, and no thread waits there. Each is
    /// returned once; none while a fault is still to be [answered](Self::next_step).
    pub(crate) fn next_give_back(&mut self) -> Option<ZeroRange> {
        if !self.ready.is_empty() {
            return None;
        }
        self.give_back.next(&self.regions)
    }

    /// Notes that `range` was unregistered.
    pub(crate) fn on_given_back(&mut self, range: &ZeroRange) {
        // A thread that faulted there meanwhile gets a wake, and finds zeros at its next touch.
        self.set_installed(range.at, range.pages);
    }

    /// Ends giving back.
    pub(crate) fn stop_give_back(&mut self) {
        self.give_back = GiveBack::default();
    }

    fn states_mut(&mut self, region: RegionIndex) -> Option<&mut PageStates> {
        self.regions.get_mut(region).map(|tracked| &mut tracked.states)
    }

    fn set_installed(&mut self, at: PageRef, pages: usize) {
        if let Some(states) = self.states_mut(at.region) {
            states.set_installed(at.page, pages);
        }
    }

    fn park(&mut self, at: PageRef) {
        self.parked.push(at);
        self.set_waiting(at);
    }

    fn set_waiting(&mut self, at: PageRef) {
        if let Some(states) = self.states_mut(at.region) {
            states.set_waiting(at.page);
        }
    }

    fn clear_waiting(&mut self, at: PageRef) {
        if let Some(states) = self.states_mut(at.region) {
            states.clear_waiting(at.page);
        }
    }

    /// Counts the wakes of one page in a row. `range` is the page.
    fn count_repeat(&mut self, at: PageRef, range: HostRange) -> Result<(), Violation> {
        let times = match self.repeated {
            Some((page, times)) if page == at => times + 1,
            _ => 1,
        };
        self.repeated = Some((at, times));
        if times > MOST_REPEATS {
            return Err(Violation::PageLost { address: range.start() });
        }
        Ok(())
    }
}

/// The install of absent pages, given as first page and count.
fn template_pages(index: RegionIndex, region: &Region, (first, pages): (PageIndex, usize)) -> Install {
    Install {
        at: PageRef {
            region: index,
            page: first,
        },
        pages,
        to: region.range_of(first, pages),
        page_size: region.page_size(),
        content: Content::Template(region.offset_of(first)),
    }
}

#[cfg(test)]
mod tests;
