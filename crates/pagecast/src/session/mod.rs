//! One fork's state machine: events and outcomes in, steps out. No I/O and no clock.
//!
//! Whoever drives a [`Session`] reads **all** events of the kernel first and hands them to [`Session::on_event`], which
//! applies removals at once and queues faults. Then it takes [`Session::next_step`] until there is none, carries each step
//! out and reports with [`Session::on_outcome`] what came of it. What the kernel asked to retry is parked until
//! [`Session::release_parked`], which the driver calls after a pause of its choice; what needs bytes that are not there
//! yet waits for [`Session::bytes_ready`].
//!
//! To complete a fork, [`Session::begin_completion`]; from then on [`Session::next_fill`] hands out what is left to
//! install, run by run, after all demand faults, and at the end says that the regions can be unregistered.

mod page_states;
mod region;
mod step;

use std::collections::VecDeque;

use pagecast_uffd::{Event, FaultFlags, HostRange, Outcome, PageFault};

use crate::page::{PageIndex, PageSize};
use crate::template::TemplateOffset;
use page_states::{PageState, PageStates};
pub use region::{Region, RegionIndex, RegionMap};
pub use step::{After, Content, FillRun, Install, Noted, PageRef, Purpose, Step, Violation};

/// The most bytes one fill installs at once, so that a demand fault never waits long behind it. Chunks of 64 KiB and more
/// run at the full speed of `UFFDIO_COPY`.
const FILL_BYTES: u64 = 256 * 1024;

/// How often in a row the same page may fault though it is installed before we call it lost. Threads that fault at once
/// make a few; no VMM has this many.
const MOST_REPEATS: u32 = 4096;

/// One fork's regions, the state of each page, and the faults that wait for an answer.
#[derive(Debug)]
pub struct Session {
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
    completion: Option<Completion>,
}

/// How far a completion has come.
#[derive(Clone, Copy, Debug)]
struct Completion {
    /// Everything before this has been installed or needs not be.
    region: RegionIndex,
    page: PageIndex,
    /// Install single pages up to the end of this run: it spans mappings that were split.
    single_pages: bool,
}

impl Session {
    /// The session of a fork with these regions, none of whose pages is there yet.
    pub fn new(regions: RegionMap) -> Self {
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
            completion: None,
        }
    }

    /// Its regions.
    pub fn regions(&self) -> &RegionMap {
        &self.regions
    }

    /// Takes note of an event: queues a fault, applies a removal.
    ///
    /// # Errors
    ///
    /// [`Violation`] where the fork cannot be served any longer.
    pub fn on_event(&mut self, event: &Event) -> Result<Noted, Violation> {
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
        let Some(states) = self.states_mut(region) else {
            return Err(Violation::FaultOutside { address });
        };
        if !states.set_pending(page) {
            return Ok(Noted::SameFault);
        }
        self.ready.push_back(at);
        Ok(Noted::Fault)
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
    pub fn next_step(&mut self) -> Result<Option<Step>, Violation> {
        let Some(at) = self.ready.pop_front() else {
            return Ok(None);
        };
        let step = match self.state(at) {
            PageState::Absent | PageState::Removed => self.demand(at).map(Step::Install),
            PageState::Installed => {
                self.answered(at);
                let range = self.range(at);
                self.count_repeat(at)?;
                range.map(Step::Wake)
            }
        };
        Ok(step)
    }

    /// The template's bytes for this install are not there yet: it waits for [`bytes_ready`](Self::bytes_ready).
    pub fn await_bytes(&mut self, _install: &Install) {
        self.awaiting_bytes += 1;
    }

    /// The bytes of a page that waited for them are there: what to do about it *now*. It may have been removed since, and
    /// then gets zeros; or installed, and then needs a wake.
    ///
    /// # Errors
    ///
    /// [`Violation::PageLost`].
    pub fn bytes_ready(&mut self, at: PageRef) -> Result<Option<Step>, Violation> {
        self.awaiting_bytes = self.awaiting_bytes.saturating_sub(1);
        self.ready.push_front(at);
        self.next_step()
    }

    /// Takes note of what an install came to.
    pub fn on_outcome(&mut self, install: &Install, outcome: Outcome) -> After {
        match install.purpose {
            Purpose::Demand => self.on_demand_outcome(install, outcome),
            Purpose::Fill => self.on_fill_outcome(install, outcome),
        }
    }

    fn on_demand_outcome(&mut self, install: &Install, outcome: Outcome) -> After {
        let at = install.at;
        match outcome {
            Outcome::Installed => {
                self.repeated = None;
                self.set_installed(at, 1);
                self.answered(at);
                After::Done
            }
            Outcome::AlreadyPresent => {
                self.set_installed(at, 1);
                self.answered(at);
                After::Wake(install.to)
            }
            // Unmapped since: whoever waited has to find out by touching it again.
            Outcome::NotRegistered => {
                self.answered(at);
                After::Wake(install.to)
            }
            Outcome::Retry { .. } => {
                self.parked.push(at);
                After::Parked
            }
            Outcome::OutOfMemory => {
                self.parked.push(at);
                After::OutOfMemory
            }
            Outcome::PeerGone => After::PeerGone,
            Outcome::Failed(errno) => After::Failed(errno),
        }
    }

    /// Whether a fault waits for a retry.
    pub fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Faults that have been read and not answered yet.
    pub fn unanswered(&self) -> usize {
        self.ready.len() + self.parked.len() + self.awaiting_bytes
    }

    /// Queues everything parked for another try.
    pub fn release_parked(&mut self) {
        self.ready.extend(self.parked.drain(..));
    }

    /// Begins to complete the fork. Idempotent.
    pub fn begin_completion(&mut self) {
        self.completion.get_or_insert(Completion {
            region: RegionIndex::FIRST,
            page: PageIndex::new(0),
            single_pages: false,
        });
    }

    /// Gives the completion up; the fork is served as before. What was installed stays.
    pub fn abandon_completion(&mut self) {
        self.completion = None;
    }

    /// Whether a completion was begun and not given up.
    pub fn is_completing(&self) -> bool {
        self.completion.is_some()
    }

    /// The next run to fill; `None` where everything is in place (or nothing is to be completed), and the regions can be
    /// unregistered. The same again until [`fill_part`](Self::fill_part) has been taken to its end and reported.
    pub fn next_fill(&mut self) -> Option<FillRun> {
        loop {
            let completion = self.completion.as_mut()?;
            let region = self.regions.get(completion.region)?;
            let most = usize::try_from(FILL_BYTES / region.page_size().bytes()).map_or(1, |pages| pages.max(1));
            let states = self.states.get(completion.region.get())?;
            if let Some((first, pages)) = states.next_absent(completion.page, most) {
                completion.page = first;
                return Some(FillRun {
                    region: completion.region,
                    first,
                    pages,
                    from: region.offset_of(first),
                    page_size: region.page_size(),
                });
            }
            completion.region = completion.region.next();
            completion.page = PageIndex::new(0);
        }
    }

    /// What of `run` is still to be installed, from where the last part ended. `None` at its end, or where the completion
    /// has been given up, or begun again and not come to `run` yet.
    pub fn fill_part(&mut self, run: &FillRun) -> Option<Install> {
        let end = run.first.get() + run.pages;
        // A run that an earlier completion asked for may lie ahead of this one, and its bytes belong nowhere else.
        let here = |at: &&mut Completion| at.region == run.region && at.page >= run.first;
        let completion = self.completion.as_mut().filter(here)?;
        let left = end.checked_sub(completion.page.get()).filter(|left| *left > 0);
        let most = if completion.single_pages { 1 } else { run.pages };
        let states = self.states.get(run.region.get())?;
        let found = left.and_then(|_| states.next_absent(completion.page, most));
        let Some((first, pages)) = found.filter(|(first, _)| first.get() < end) else {
            completion.page = completion.page.max(PageIndex::new(end));
            completion.single_pages = false;
            return None;
        };
        completion.page = first;
        let pages = pages.min(end - first.get());
        let region = self.regions.get(run.region)?;
        Some(Install {
            at: PageRef {
                region: run.region,
                page: first,
            },
            pages,
            to: region.range_of(first, pages),
            page_size: run.page_size,
            content: Content::Template(region.offset_of(first)),
            purpose: Purpose::Fill,
        })
    }

    /// The pages of this part are zeros in the template. They need not be installed: once unregistered, the kernel fills
    /// them with zeros by itself.
    pub fn skip_fill(&mut self, install: &Install) {
        self.advance_fill(install.at, install.pages);
    }

    fn on_fill_outcome(&mut self, install: &Install, outcome: Outcome) -> After {
        let at = install.at;
        match outcome {
            Outcome::Installed => {
                self.set_installed(at, install.pages);
                self.advance_fill(at, install.pages);
                After::Done
            }
            Outcome::Retry { installed } => {
                let pages = usize::try_from(installed.get() / install.page_size.bytes()).unwrap_or(0);
                self.set_installed(at, pages);
                self.advance_fill(at, pages);
                After::Parked
            }
            Outcome::AlreadyPresent => {
                self.set_installed(at, 1);
                self.advance_fill(at, 1);
                After::Done
            }
            // The kernel installs into one mapping at a time and says the same where a run spans two.
            Outcome::NotRegistered if install.pages > 1 => {
                if let Some(completion) = &mut self.completion {
                    completion.single_pages = true;
                }
                After::Done
            }
            Outcome::NotRegistered => {
                self.advance_fill(at, 1);
                After::Done
            }
            Outcome::OutOfMemory => After::OutOfMemory,
            Outcome::PeerGone => After::PeerGone,
            Outcome::Failed(errno) => After::Failed(errno),
        }
    }

    fn advance_fill(&mut self, from: PageRef, pages: usize) {
        if let Some(completion) = &mut self.completion {
            completion.page = PageIndex::new(from.page.get() + pages);
        }
    }

    /// Every run of absent pages, each within one region: what a completion would have to look at. As offset in the
    /// template and number of pages.
    pub fn absent_runs(&self) -> impl Iterator<Item = (TemplateOffset, usize, PageSize)> {
        self.regions.iter().zip(&self.states).flat_map(|((_, region), states)| {
            let mut from = PageIndex::new(0);
            std::iter::from_fn(move || {
                let (first, pages) = states.next_absent(from, usize::MAX)?;
                from = PageIndex::new(first.get() + pages);
                Some((region.offset_of(first), pages, region.page_size()))
            })
        })
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

    fn answered(&mut self, at: PageRef) {
        if let Some(states) = self.states_mut(at.region) {
            states.clear_pending(at.page);
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
            purpose: Purpose::Demand,
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
