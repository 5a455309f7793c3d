//! Installing what nobody waits for, in bounded steps: a prefault, or what a completion has left.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagecast_uffd::HostRange;
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;

use super::lane::{Done, Lane};
use super::pause::Pause;
use super::watch::Watch;
use super::{Awaited, End, Scratch, ServedFork, kernel};
use crate::page::PageSize;
use crate::server::crew::Helpers;
use crate::server::failure::FailReason;
use crate::server::fork::{Plan, Prefault};
use crate::session::{After, Fill};
use crate::template::{PrefaultPlan, Recording, SourceError};

/// How many fills a lane carries out at most before the worker looks after its other forks: what is done once a step, such as
/// calling other threads, takes as long as half a fill.
const FILLS_A_LANE: usize = 4;

/// How many runs of zeros are given back in one step: some microseconds each.
const GIVEN_BACK_A_STEP: usize = 16;

impl ServedFork {
    /// Begins with what a new fork is given ahead of its faults.
    pub(in crate::server) fn begin(&mut self) {
        let source = self.template.source();
        let Plan { prefault, record } = self.record.plan;
        if record {
            // What is there does not fault.
            let recording = Recording::new(source.len());
            self.watch = Watch::new(Some(recording), None);
            return;
        }
        if prefault != Prefault::None
            && let Some(set) = self.template.working_set()
            && !self.template.prefault_score().switched_off
        {
            let plan = Arc::new(PrefaultPlan::new(set, Some(self.serial)));
            self.session.begin_working_set(Arc::clone(&plan));
            self.watch = Watch::new(None, Some(plan));
        }
        if prefault == Prefault::All {
            self.session.begin_all();
        }
    }

    /// The kernel was asked, and fills what is unregistered in pages of 4 KiB: long runs of zeros can be left to it.
    pub(in crate::server) fn kernel_fills_small(&mut self) {
        self.session.begin_give_back(self.template.zero_runs());
    }

    /// Its memory that is in pages of 4 KiB.
    pub(in crate::server) fn small_memory(&self) -> Vec<HostRange> {
        let regions = self.session.regions().iter();
        let small = regions.filter(|(_, region)| region.page_size() == PageSize::Small);
        small.map(|(_, region)| region.memory()).collect()
    }

    /// Whether [`fill`](Self::fill) has something to do.
    pub(in crate::server) fn wants_to_fill(&self) -> bool {
        (self.session.wants_to_fill() || self.session.is_completing() || !self.fills.is_empty())
            && self.fill_pause.is_none()
            && self.reading.is_none()
    }

    /// The next bounded step. All events have been read, and all faults answered that can be; no more are read before it is
    /// over, on whatever threads it is. So no page is installed ahead whose removal has been read.
    pub(in crate::server) fn fill(&mut self, scratch: &mut Scratch) -> Result<(), End> {
        if self.give_back()? {
            return Ok(());
        }
        if let Some(first) = self.next_fill() {
            let crew = Arc::clone(&scratch.crew);
            let helpers = crew.take_free();
            let lanes = 1 + helpers.count();
            let more = std::iter::from_fn(|| self.next_fill()).take(lanes * FILLS_A_LANE - 1);
            let fills = std::iter::once(first).chain(more).collect();
            let (begun, before) = (Instant::now(), self.record.counters.installed_bytes.get());
            self.fill_pieces(fills, &helpers, scratch)?;
            self.keep_rate(begun, self.record.counters.installed_bytes.get() - before, scratch);
            return Ok(());
        }
        if self.session.is_completing() {
            return self.unregister(scratch);
        }
        Ok(())
    }

    /// Has the kernel fill some long runs of zeros by itself. Whether there were any.
    fn give_back(&mut self) -> Result<bool, End> {
        for step in 0..GIVEN_BACK_A_STEP {
            let Some(zeros) = self.session.next_give_back() else {
                return Ok(step > 0);
            };
            if step == 0
                && let Err(error) = self.template.source().check_unchanged()
            {
                if !error.may_pass() {
                    return Err(End::template(error));
                }
                // The zeros of this range are installed on demand.
                self.pause_filling();
                return Ok(true);
            }
            match self.uffd.unregister(zeros.memory) {
                Ok(()) => {
                    self.session.on_given_back(&zeros);
                    self.record.counters.given_back_bytes.add(zeros.memory.len().get());
                }
                // No memory, too many mappings, or an address space that is gone, which others notice. The zeros that
                // are left are installed on demand.
                Err(_) => self.session.stop_give_back(),
            }
        }
        Ok(true)
    }

    /// Pauses a completion that nobody waits for, so that installing so many bytes since `begun` was not too fast.
    fn keep_rate(&mut self, begun: Instant, bytes: u64, scratch: &Scratch) {
        let Some(rate) = scratch
            .completion_rate
            .filter(|_| self.session.is_completing() && !self.at_once)
        else {
            return;
        };
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
        let until = begun + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        if until > Instant::now() {
            self.fill_pause = self.fill_pause.max(Some(until));
        }
    }

    /// The kernel wants what nobody waits for to be tried again: soon at first, then ever less often.
    pub(super) fn pause_filling(&mut self) {
        let now = Instant::now();
        let pause = self.fill_retry.get_or_insert_with(|| Pause::first(now));
        pause.lengthen(now);
        self.fill_pause = self.fill_pause.max(Some(pause.until()));
    }

    fn next_fill(&mut self) -> Option<Fill> {
        self.fills.pop().or_else(|| self.session.next_fill())
    }

    /// Installs some of these fills, on this thread and those that help; all of them where nothing happens that the worker has
    /// to look at.
    fn fill_pieces(&mut self, fills: Vec<Fill>, helpers: &Helpers<'_>, scratch: &mut Scratch) -> Result<(), End> {
        let lanes = 1 + helpers.count();
        let zeros_are_known = self.template.zeros_are_known();
        let all_parts: Vec<_> = fills.iter().map(|fill| self.session.fill_parts(fill)).collect();
        let stop = AtomicBool::new(false);
        let (fills_of, stop, epoll) = (&fills, &stop, &scratch.epoll);
        let all_parts = &all_parts;
        scratch.rooms.resize_with(lanes.max(scratch.rooms.len()), Vec::new);
        let work = scratch.rooms.iter_mut().take(lanes).enumerate().map(|(number, room)| {
            let mut lane = Lane {
                uffd: &self.uffd,
                pid: self.peer.pid,
                source: self.template.source(),
                zeros_are_known,
                zeros: &scratch.zeros,
                room,
            };
            move || {
                let mut all_done = Vec::new();
                let pieces = fills_of.iter().zip(all_parts).enumerate();
                for (index, (fill, parts)) in pieces.skip(number).step_by(lanes) {
                    let done = lane.carry_out(fill, parts, None);
                    // What follows would get no further either. And a demand fault goes first; one lane looks for all.
                    let is_stuck = done.last().is_some_and(Done::is_stuck);
                    all_done.push((index, done));
                    if is_stuck || (number == 0 && has_event(epoll)) {
                        stop.store(true, Ordering::Relaxed);
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                all_done
            }
        });
        let mut all_done: Vec<_> = helpers.run(work.collect()).into_iter().flatten().collect();
        // What was not come to is next.
        all_done.sort_unstable_by_key(|(index, _)| *index);
        let mut all_done = all_done.into_iter().peekable();
        let (mut begun, mut left) = (Vec::new(), Vec::new());
        for (index, fill) in fills.into_iter().enumerate() {
            match all_done.next_if(|(done, _)| *done == index) {
                Some((_, done)) => begun.push((fill, done)),
                None => left.push(fill),
            }
        }
        self.fills.extend(left.into_iter().rev());
        for (fill, done) in begun {
            self.conclude(fill, done, scratch)?;
        }
        Ok(())
    }

    fn fill_with(&mut self, fill: Fill, bytes: &[u8], scratch: &mut Scratch) -> Result<(), End> {
        let parts = self.session.fill_parts(&fill);
        let mut lane = Lane {
            uffd: &self.uffd,
            pid: self.peer.pid,
            source: self.template.source(),
            zeros_are_known: false,
            zeros: &scratch.zeros,
            room: &mut scratch.bytes,
        };
        let done = lane.carry_out(&fill, &parts, Some(bytes));
        self.conclude(fill, done, scratch)
    }

    /// Takes note of what was done about a fill, and keeps it where there is more to do.
    fn conclude(&mut self, mut fill: Fill, done: Vec<Done>, scratch: &Scratch) -> Result<(), End> {
        for done in done {
            let (part, zeros, outcome) = match done {
                Done::Tried { part, zeros, outcome } => (part, zeros, outcome),
                Done::Skipped(part) => {
                    fill.skip(&part);
                    continue;
                }
                Done::NotReady => {
                    self.read_fill(fill, scratch);
                    return Ok(());
                }
                Done::Unreadable(error) => return self.on_unreadable_fill(fill, error),
                Done::Unverified(error) => return Err(End::template(error)),
            };
            let (installed, after) = self.session.on_filled(&mut fill, &part, outcome);
            let counters = &self.record.counters;
            counters.prefaulted.add(installed as u64);
            if !zeros {
                counters.installed_bytes.add(installed as u64 * part.page_size.bytes());
            }
            if installed > 0 {
                self.fill_retry = None;
            }
            match after {
                After::Done | After::Wake(_) => self.fill_retry = None,
                After::Parked => {
                    counters.retried.add(1);
                    self.pause_filling();
                }
                After::OutOfMemory => {
                    self.give_up_filling(FailReason::NoMemoryAhead);
                    return Ok(());
                }
                After::PeerGone => return Err(End::PeerGone),
                After::Failed(errno) => return Err(kernel("install a page", errno)),
            }
        }
        if !self.session.fill_parts(&fill).is_empty() {
            self.fills.push(fill);
        }
        Ok(())
    }

    /// Has a fill read where that may take a while, one at a time.
    fn read_fill(&mut self, fill: Fill, scratch: &Scratch) {
        if self.reading.is_some() {
            return self.fills.push(fill);
        }
        let (from, length) = (fill.from, fill.bytes());
        self.reading = Some(fill);
        self.read_later(Awaited::Fill, from, length, None, &scratch.deliver);
    }

    /// The bytes of a fill cannot be had now.
    fn on_unreadable_fill(&mut self, fill: Fill, error: SourceError) -> Result<(), End> {
        if error.may_pass() && self.reading.is_some() {
            self.fills.push(fill);
            return Ok(());
        }
        self.reading = Some(fill);
        self.read_failed(Awaited::Fill, None, error)
    }

    /// The bytes of a fill, read elsewhere, have come.
    pub(super) fn on_fill_bytes(&mut self, bytes: &[u8], scratch: &mut Scratch) -> Result<(), End> {
        match self.reading.take() {
            Some(fill) => self.fill_with(fill, bytes, scratch),
            None => Ok(()),
        }
    }

    /// Installs nothing any more that nobody waits for. Who asked for a completion hears of it; a prefault is best effort,
    /// and its numbers tell how far it came.
    pub(super) fn give_up_filling(&mut self, reason: FailReason) {
        self.session.stop_prefault();
        if self.session.is_completing() {
            self.give_up_completion(reason);
        }
        self.drop_fills();
    }

    /// Forgets what was begun. Its bytes are not for what may be wanted later, which begins anew.
    pub(super) fn drop_fills(&mut self) {
        self.fills.clear();
        self.reading = None;
        self.fill_pause = None;
        self.fill_retry = None;
        self.reads.forget_fill();
    }
}

/// Whether something waits for the worker.
fn has_event(epoll: &OwnedFd) -> bool {
    let mut ready = [PollFd::new(epoll, PollFlags::IN)];
    rustix::event::poll(&mut ready, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
