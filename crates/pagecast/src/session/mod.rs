//! One fork's state machine: events and outcomes in, steps out. No I/O and no clock.
//!
//! Whoever drives a [`Session`] reads **all** events of the kernel first and hands them to [`Session::on_event`], which
//! applies removals at once and queues faults. Then it takes [`Session::next_step`] until there is none, carries each step
//! out and reports with [`Session::on_outcome`] what came of it. What the kernel asked to retry is parked until
//! [`Session::release_parked`], which the driver calls after a pause of its choice; what needs bytes that are not there
//! yet waits for [`Session::bytes_ready`].
//!
//! What is to be installed though nobody waits for it (a prefault, a completion) is handed out by [`Session::next_fill`],
//! piece by piece: [`Session::fill_parts`] says what of a piece is still absent, [`Session::on_filled`] takes note of what
//! came of it. Long runs of zeros need not be installed at all: [`Session::next_give_back`].

mod filling;
mod give_back;
mod page_states;
mod region;
mod step;

use std::collections::VecDeque;
use std::sync::Arc;

use pagecast_uffd::{Event, FaultFlags, HostRange, Outcome, PageFault};

use crate::page::PageIndex;
use crate::template::{PrefaultPlan, ZeroRuns};
pub(crate) use filling::Fill;
use filling::Filling;
use give_back::GiveBack;
pub(crate) use give_back::ZeroRange;
use page_states::{PageState, PageStates};
pub(crate) use region::{Region, RegionIndex, RegionMap};
pub use step::Violation;
pub(crate) use step::{After, Content, Install, Noted, PageRef, Step};

/// How often in a row the same page may fault though it is installed before we call it lost. Threads that fault at once
/// make a few; no VMM has this many.
const MOST_REPEATS: u32 = 4096;

/// One fork's regions, the state of each page, and the faults that wait for an answer.
#[derive(Debug)]
pub(crate) struct Session {
    regions: RegionMap,
    /// One an entry of `regions`, in the same order.
    states: Box<[PageStates]>,
    /// Faults to answer next.
    ready: VecDeque<PageRef>,
    /// Faults the kernel would not let us answer yet.
    parked: Vec<PageRef>,
    /// Faults that wait for the template's bytes; their number only, since the driver holds the rest.
    awaiting_bytes: usize,
    /// The page that last faulted though installed, and how often in a row.
    repeated: Option<(PageRef, u32)>,
    filling: Filling,
    give_back: GiveBack,
}

impl Session {
    /// The session of a fork with these regions, none of whose pages is there yet.
    pub(crate) fn new(regions: RegionMap) -> Self {
        let states = regions
            .iter()
            .map(|(_, region)| PageStates::new(region.pages()))
            .collect();
        Self {
            regions,
            states,
            ready: VecDeque::new(),
            parked: Vec::new(),
            awaiting_bytes: 0,
            repeated: None,
            filling: Filling::default(),
            give_back: GiveBack::default(),
        }
    }

    /// Its regions.
    pub(crate) fn regions(&self) -> &RegionMap {
        &self.regions
    }

    /// Takes note of an event: queues a fault, applies a removal.
    ///
    /// # Errors
    ///
    /// [`Violation`] where the fork cannot be served any longer.
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
        let (Some(region), Some(states)) = (self.regions.get(region), self.states.get(region.get())) else {
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
        for ((_, region), states) in self.regions.iter().zip(&mut self.states) {
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
            let Some(states) = self.states.get(at.region.get()) else {
                continue;
            };
            // What answers the fault that waits already wakes whoever made this one, too.
            if states.is_waiting(at.page) {
                continue;
            }
            return Ok(match states.get(at.page) {
                PageState::Absent | PageState::Removed => self.demand(at).map(Step::Install),
                PageState::Installed => {
                    let range = self.range(at);
                    self.count_repeat(at)?;
                    range.map(Step::Wake)
                }
            });
        }
        Ok(None)
    }

    /// The template's bytes for this install are not there yet: it waits for [`bytes_ready`](Self::bytes_ready).
    pub(crate) fn await_bytes(&mut self, install: &Install) {
        self.awaiting_bytes += 1;
        self.set_waiting(install.at);
    }

    /// The bytes of a page that waited for them are there: what to do about it *now*. It may have been removed since, and
    /// then gets zeros; or installed, and then needs a wake.
    ///
    /// # Errors
    ///
    /// [`Violation::PageLost`].
    pub(crate) fn bytes_ready(&mut self, at: PageRef) -> Result<Option<Step>, Violation> {
        self.awaiting_bytes = self.awaiting_bytes.saturating_sub(1);
        self.clear_waiting(at);
        self.ready.push_front(at);
        self.next_step()
    }

    /// Takes note of what the install of a demand fault came to.
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
            // Unmapped since: whoever waited has to find out by touching it again.
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

    /// Whether a fault waits for a retry.
    pub(crate) fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Queues everything parked for another try.
    pub(crate) fn release_parked(&mut self) {
        for at in std::mem::take(&mut self.parked) {
            self.clear_waiting(at);
            self.ready.push_back(at);
        }
    }

    /// Installs this working set ahead of its faults. Where a completion goes on too, this comes first.
    pub(crate) fn begin_working_set(&mut self, plan: Arc<PrefaultPlan>) {
        self.filling.begin_working_set(plan);
    }

    /// Installs everything ahead of its faults, after what else there is, and goes on serving.
    pub(crate) fn begin_all(&mut self) {
        self.filling.begin_all();
    }

    /// Gives up what was to be installed ahead, but not a completion.
    pub(crate) fn stop_prefault(&mut self) {
        self.filling.stop_prefault();
    }

    /// Begins to complete the fork. Idempotent.
    pub(crate) fn begin_completion(&mut self) {
        self.filling.begin_completion();
    }

    /// Gives the completion up; the fork is served as before. What was installed stays.
    pub(crate) fn abandon_completion(&mut self) {
        self.filling.abandon_completion();
    }

    /// Whether a completion was begun and not given up.
    pub(crate) fn is_completing(&self) -> bool {
        self.filling.is_completing()
    }

    /// Whether there is something left for [`next_fill`](Self::next_fill) or [`next_give_back`](Self::next_give_back).
    pub(crate) fn wants_to_fill(&self) -> bool {
        self.filling.is_wanted() || !self.give_back.is_done()
    }

    /// The next piece to fill, once each: it has to be carried to its end, or is lost to this prefault or completion. `None`
    /// where everything has been handed out; once that is carried out too, and a completion was wanted, the regions can be
    /// unregistered.
    pub(crate) fn next_fill(&mut self) -> Option<Fill> {
        self.filling.next(&self.regions, &self.states)
    }

    /// What of this piece is still to be installed, in ascending order. Nothing once it has come to its end.
    pub(crate) fn fill_parts(&self, fill: &Fill) -> Vec<Install> {
        let (Some(region), Some(states)) = (self.regions.get(fill.region), self.states.get(fill.region.get())) else {
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
            parts.push(Install {
                at: PageRef {
                    region: fill.region,
                    page: first,
                },
                pages,
                to: region.range_of(first, pages),
                page_size: fill.page_size,
                content: Content::Template(region.offset_of(first)),
            });
        }
        parts
    }

    /// Takes note of what installing a part of a piece came to: how many pages are there now, and what is left to do.
    pub(crate) fn on_filled(&mut self, fill: &mut Fill, part: &Install, outcome: Outcome) -> (usize, After) {
        let (present, after) = fill.on_outcome(part, outcome);
        self.set_installed(part.at, present);
        (present, after)
    }

    /// The kernel itself is to fill these runs of the template, which are zeros: it does so in pages of 4 KiB. A completion
    /// leaves zeros to it from now on, too.
    pub(crate) fn begin_give_back(&mut self, zeros: ZeroRuns) {
        self.filling.set_kernel_fills_small();
        self.give_back = GiveBack::new(zeros);
    }

    /// The next range that can be unregistered, since what it holds is zeros either way and nobody waits there. Each once;
    /// none while a fault is still to be [answered](Self::next_step).
    pub(crate) fn next_give_back(&mut self) -> Option<ZeroRange> {
        if !self.ready.is_empty() {
            return None;
        }
        self.give_back.next(&self.regions, &self.states)
    }

    /// It was unregistered.
    pub(crate) fn on_given_back(&mut self, range: &ZeroRange) {
        // Whoever faulted there meanwhile finds it by a touch.
        self.set_installed(range.at, range.pages);
    }

    /// Nothing more can be given back.
    pub(crate) fn stop_give_back(&mut self) {
        self.give_back = GiveBack::default();
    }

    fn states_mut(&mut self, region: RegionIndex) -> Option<&mut PageStates> {
        self.states.get_mut(region.get())
    }

    fn state(&self, at: PageRef) -> PageState {
        self.states
            .get(at.region.get())
            .map_or(PageState::Installed, |states| states.get(at.page))
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

    fn range(&self, at: PageRef) -> Option<HostRange> {
        self.regions.get(at.region).map(|region| region.range_of(at.page, 1))
    }

    fn demand(&self, at: PageRef) -> Option<Install> {
        let region = self.regions.get(at.region)?;
        let content = match self.state(at) {
            PageState::Removed => Content::Zeros,
            PageState::Absent | PageState::Installed => Content::Template(region.offset_of(at.page)),
        };
        Some(Install {
            at,
            pages: 1,
            to: region.range_of(at.page, 1),
            page_size: region.page_size(),
            content,
        })
    }

    fn count_repeat(&mut self, at: PageRef) -> Result<(), Violation> {
        let times = match self.repeated {
            Some((page, times)) if page == at => times + 1,
            _ => 1,
        };
        self.repeated = Some((at, times));
        match self.range(at) {
            Some(range) if times > MOST_REPEATS => Err(Violation::PageLost { address: range.start() }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
