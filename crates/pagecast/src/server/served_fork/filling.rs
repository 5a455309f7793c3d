//! Installing what nobody waits for, in bounded steps: a prefault, or what a completion has left.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pagecast_uffd::HostRange;
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;

use super::fill_step::{FillStep, Filled};
use super::lane::Done;
use super::pause::Pause;
use super::watch::Watch;
use super::{Awaited, End, Scratch, ServedFork, kernel};
use crate::page::PageSize;
use crate::server::failure::FailReason;
use crate::server::fork_options::{Plan, Prefault};
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
        (self.session.wants_to_fill()
            || self.session.is_completing()
            || !self.fills.is_empty()
            || self.bytes_of_fill.is_some())
            && self.fill_pause.is_none()
            && self.reading.is_none()
            && self.filled_elsewhere.is_none()
    }

    /// The next bounded step, on this thread and those that help. All events have been read, and all faults answered that can
    /// be; no more are read before it is over, on whatever threads it is. So no page is installed ahead whose removal has been
    /// read.
    pub(in crate::server) fn fill(&mut self, scratch: &mut Scratch) -> Result<(), End> {
        let fill_pool = Arc::clone(&scratch.fill_pool);
        let helpers = fill_pool.take_free();
        let Some(step) = self.next_fill_step(helpers.count(), scratch)? else {
            return Ok(());
        };
        let filled = step.carry_out(&helpers, &scratch.zeros, || has_event(&scratch.epoll));
        self.conclude_step(filled, scratch)
    }

    /// The next bounded step, to be carried out elsewhere until it is told to stop: [`on_filled`](Self::on_filled) takes what
    /// came of it. No event is read before that. What takes no time is done at once, and `None`.
    pub(in crate::server) fn begin_fill_elsewhere(
        &mut self,
        scratch: &mut Scratch,
    ) -> Result<Option<(FillStep, Arc<AtomicBool>)>, End> {
        let helpers = scratch.fill_pool.take_free().count();
        let step = self.next_fill_step(helpers, scratch)?;
        Ok(step.map(|step| {
            let interrupt = Arc::new(AtomicBool::new(false));
            self.filled_elsewhere = Some(Arc::clone(&interrupt));
            (step, interrupt)
        }))
    }

    /// A step that was carried out elsewhere is over: whatever has happened meanwhile is looked at now.
    pub(in crate::server) fn on_filled(&mut self, filled: Filled, scratch: &mut Scratch) -> Result<(), End> {
        self.filled_elsewhere = None;
        self.conclude_step(filled, scratch)?;
        if self.unread {
            self.serve(false, scratch)?;
        }
        Ok(())
    }

    /// The next step for this thread and `helpers` more. `None` if it is done already.
    fn next_fill_step(&mut self, helpers: usize, scratch: &mut Scratch) -> Result<Option<FillStep>, End> {
        if self.give_back()? {
            return Ok(None);
        }
        let (fills, bytes): (Vec<_>, _) = if let Some((fill, bytes)) = self.bytes_of_fill.take() {
            (vec![fill], Some(bytes))
        } else {
            let fills = std::iter::from_fn(|| self.next_fill());
            (fills.take((1 + helpers) * FILLS_A_LANE).collect(), None)
        };
        if fills.is_empty() {
            if self.session.is_completing() {
                self.unregister(scratch)?;
            }
            return Ok(None);
        }
        Ok(Some(FillStep {
            uffd: Arc::clone(&self.uffd),
            pid: self.peer.pid,
            template: self.template.clone(),
            parts: fills.iter().map(|fill| self.session.fill_parts(fill)).collect(),
            fills,
            bytes,
            plan: self.fill_plan,
        }))
    }

    fn conclude_step(&mut self, filled: Filled, scratch: &mut Scratch) -> Result<(), End> {
        let before = self.record.counters.installed_bytes.get();
        // Fills of a plan that was dropped meanwhile are not carried on with.
        let is_wanted = filled.plan == self.fill_plan;
        if is_wanted {
            self.fills.extend(filled.left.into_iter().rev());
        }
        for (fill, done) in filled.done {
            self.conclude(fill, done, is_wanted, scratch)?;
        }
        let bytes = self.record.counters.installed_bytes.get() - before;
        self.keep_rate(filled.begun, bytes, scratch);
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

    /// Takes note of what was done about a fill, and keeps it where there is more to do and that `is_wanted`.
    fn conclude(&mut self, mut fill: Fill, done: Vec<Done>, is_wanted: bool, scratch: &Scratch) -> Result<(), End> {
        for done in done {
            let (part, zeros, outcome) = match done {
                Done::Tried { part, zeros, outcome } => (part, zeros, outcome),
                Done::Skipped(part) => {
                    fill.skip(&part);
                    continue;
                }
                Done::NotReady if is_wanted => {
                    self.read_fill(fill, scratch);
                    return Ok(());
                }
                Done::Unreadable(error) if is_wanted || !error.may_pass() => {
                    return self.on_unreadable_fill(fill, error);
                }
                Done::NotReady | Done::Unreadable(_) => return Ok(()),
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
        if is_wanted && !self.session.fill_parts(&fill).is_empty() {
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

    /// The bytes of a fill, read elsewhere, have come: they are installed by the next step.
    pub(super) fn on_fill_bytes(&mut self, bytes: Arc<Vec<u8>>) {
        self.bytes_of_fill = self.reading.take().map(|fill| (fill, bytes));
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
        self.fill_plan += 1;
        self.fills.clear();
        self.reading = None;
        self.bytes_of_fill = None;
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
