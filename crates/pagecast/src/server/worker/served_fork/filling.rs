//! Installing pages that no thread waits for, in bounded steps: a prefault, or the rest of a completion.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pagecast_uffd::HostRange;

use super::first_faults::FirstFaults;
use super::{Awaited, End, Scratch, ServedFork, kernel};
use crate::page::PageSize;
use crate::server::fill::{Done, FillStep, Filled};
use crate::server::fork::{FailReason, Plan, Prefault};
use crate::session::{After, Fill, Region};
use crate::template::{PrefaultPlan, Recording, SourceError};

/// The most fills of one thread before the worker serves its other forks. The fixed work of a step, such as waking
/// other threads, takes as long as half a fill.
const FILLS_A_THREAD: usize = 4;

/// The most runs of zeros that are given back in one step: some microseconds each.
const GIVEN_BACK_A_STEP: usize = 16;

impl ServedFork {
    /// Begins the prefault or the recording of a new fork.
    pub(in crate::server::worker) fn begin(&mut self) {
        let source = self.template.source();
        let Plan { prefault, record } = self.record.plan;
        if record {
            // Installed pages do not fault.
            let recording = Recording::new(source.len());
            self.first_faults = FirstFaults::new(Some(recording), None);
            return;
        }
        if prefault != Prefault::None
            && let Some(set) = self.template.working_set()
            && !self.template.prefault_score().switched_off
        {
            let plan = Arc::new(PrefaultPlan::new(set, Some(self.record.serial)));
            self.session.begin_working_set(Arc::clone(&plan));
            self.first_faults = FirstFaults::new(None, Some(plan));
        }
        if prefault == Prefault::All {
            self.session.begin_all();
        }
    }

    /// Notes that the kernel fills unregistered memory in pages of 4 KiB: long runs of zeros can be left to it.
    pub(in crate::server::worker) fn kernel_fills_small(&mut self) {
        self.session.begin_give_back(self.template.zero_runs());
    }

    /// The memory of the fork that is in pages of 4 KiB.
    pub(in crate::server::worker) fn small_memory(&self) -> Vec<HostRange> {
        let regions = self.session.regions();
        let small = regions.filter(|region| region.page_size() == PageSize::Small);
        small.map(Region::memory).collect()
    }

    /// Returns `true` if [`fill`](Self::fill) has something to do.
    pub(in crate::server::worker) fn wants_to_fill(&self) -> bool {
        let is_wanted = self.session.wants_to_fill() || self.session.completion().is_some() || self.fill.has_begun();
        is_wanted && self.fill.may_step()
    }

    /// Carries out the next bounded step, on this thread and those that help. Before it, all events were read, and all
    /// faults answered that can be. No more events are read until it is over, on any of its threads. So no page is
    /// installed ahead after its removal was read.
    pub(in crate::server::worker) fn fill(&mut self, scratch: &mut Scratch) -> Result<(), End> {
        let context = Arc::clone(&self.context);
        let threads = context.fill_pool.take_free();
        let Some(step) = self.next_fill_step(threads.count(), scratch)? else {
            return Ok(());
        };
        let filled = step.carry_out(&threads, &context.zeros, || context.has_event());
        self.conclude_step(filled)
    }

    /// Begins the next bounded step, to be carried out on another thread until its flag is set.
    /// [`on_filled`](Self::on_filled) takes its result; no event is read before that. A step that takes no time is done
    /// at once; the result is then `None`.
    pub(in crate::server::worker) fn begin_fill_elsewhere(
        &mut self,
        scratch: &mut Scratch,
    ) -> Result<Option<(FillStep, Arc<AtomicBool>)>, End> {
        let threads = self.context.fill_pool.take_free().count();
        let step = self.next_fill_step(threads, scratch)?;
        Ok(step.map(|step| (step, self.fill.begin_elsewhere())))
    }

    /// Handles the result of a step on another thread, then events that came meanwhile.
    pub(in crate::server::worker) fn on_filled(&mut self, filled: Filled, scratch: &mut Scratch) -> Result<(), End> {
        self.fill.end_elsewhere();
        self.conclude_step(filled)?;
        if self.unread {
            self.serve(false, scratch)?;
        }
        Ok(())
    }

    /// The next step for this thread and `threads` more. `None` if it is done already.
    fn next_fill_step(&mut self, threads: usize, scratch: &mut Scratch) -> Result<Option<FillStep>, End> {
        if self.give_back()? {
            return Ok(None);
        }
        let (fills, bytes) = self.fill.next(&mut self.session, (1 + threads) * FILLS_A_THREAD);
        if fills.is_empty() {
            if let Some(completion) = self.session.completion() {
                self.unregister(completion, scratch)?;
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
            generation: self.fill.generation(),
        }))
    }

    fn conclude_step(&mut self, filled: Filled) -> Result<(), End> {
        let before = self.record.counters.installed_bytes.get();
        // Fills that were dropped meanwhile are not continued.
        let is_wanted = filled.generation == self.fill.generation();
        if is_wanted {
            self.fill.keep_all(filled.left);
        }
        for (fill, done) in filled.done {
            self.conclude(fill, done, is_wanted)?;
        }
        if let Some(rate) = self.context.completion_rate
            && self.session.completion().is_some_and(|completion| !completion.at_once)
        {
            let bytes = self.record.counters.installed_bytes.get() - before;
            self.fill.keep_rate(rate, filled.begun, bytes);
        }
        Ok(())
    }

    /// Leaves some long runs of zeros to the kernel. Returns `true` if there were any.
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
                self.fill.pause_for_retry();
                return Ok(true);
            }
            match self.uffd.unregister(zeros.memory) {
                Ok(()) => {
                    self.session.on_given_back(&zeros);
                    self.record.counters.given_back_bytes.add(zeros.memory.len().get());
                }
                // No memory, too many mappings, or an address space that is gone, which is noticed elsewhere. The
                // remaining zeros are installed on demand.
                Err(_) => self.session.stop_give_back(),
            }
        }
        Ok(true)
    }

    /// Notes the result of a fill, and keeps the fill if there is more to do and that `is_wanted`.
    fn conclude(&mut self, mut fill: Fill, done: Vec<Done>, is_wanted: bool) -> Result<(), End> {
        for done in done {
            let (part, zeros, outcome) = match done {
                Done::Tried { part, zeros, outcome } => (part, zeros, outcome),
                Done::Skipped(part) => {
                    fill.skip(&part);
                    continue;
                }
                Done::NotReady if is_wanted => {
                    self.read_fill(fill);
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
                self.fill.end_retry();
            }
            match after {
                After::Done | After::Wake(_) => self.fill.end_retry(),
                After::Parked => {
                    counters.retried.add(1);
                    self.fill.pause_for_retry();
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
            self.fill.keep(fill);
        }
        Ok(())
    }

    /// Has the bytes of a fill read on another thread, one fill at a time, because that may take a while.
    fn read_fill(&mut self, fill: Fill) {
        let (from, length) = (fill.from, fill.bytes());
        if self.fill.wait_for_bytes(fill) {
            self.read_later(Awaited::Fill, from, length, None);
        }
    }

    /// Handles a fill whose bytes cannot be read now.
    fn on_unreadable_fill(&mut self, fill: Fill, error: SourceError) -> Result<(), End> {
        if !error.may_pass() || self.fill.wait_for_bytes(fill) {
            return self.read_failed(Awaited::Fill, None, error);
        }
        Ok(())
    }

    /// Stops installing pages that no thread waits for. A requested completion fails with `reason`. A prefault is best
    /// effort, and its counters show how far it came.
    pub(super) fn give_up_filling(&mut self, reason: FailReason) {
        self.session.stop_prefault();
        if self.session.completion().is_some() {
            self.give_up_completion(reason);
        } else {
            self.drop_fills();
        }
    }

    /// Drops all begun fills.
    pub(super) fn drop_fills(&mut self) {
        self.fill.drop_all();
        self.reads.forget_fill();
    }
}
