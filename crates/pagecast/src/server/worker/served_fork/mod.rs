//! One fork that is served: carries out the steps that its session decides.

mod backoff;
mod completion;
mod fault_around;
mod fill_driver;
mod filling;
mod first_faults;
mod look_again;
mod reads;
mod scratch;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use pagecast_uffd::{Drained, Errno, HostAddr, HostRange, Outcome, Peer, Uffd};

use super::context::WorkerContext;
use super::message::{NewFork, Slot};
use crate::page::PageSize;
use crate::server::fork::{FailReason, ForkEvent};
use crate::server::hugepages::presence;
use crate::server::registry::ForkRecord;
use crate::session::{After, Content, Install, Noted, Session, Step, Violation};
use crate::template::{Page, Residency, SourceError, Template, TemplateOffset};
use backoff::Backoff;
use fill_driver::FillDriver;
use first_faults::{FirstFaults, Shown};
use look_again::LookAgain;
use reads::{Awaited, Failed, Reads};
pub(super) use scratch::Scratch;

/// The most reads of events in one turn, before the other forks of the worker get theirs. The kernel does not let a
/// page be installed while a removal is unread, so stopping early is safe.
const READS_PER_TURN: usize = 8;

/// The most further checks for faults in one turn of a fork that is served alone.
const LOOKS_PER_TURN: usize = 8;

/// Why serving a fork ends.
pub(super) enum End {
    /// The address space is gone.
    PeerGone,
    /// The fork has all its memory and is unregistered.
    Complete,
    /// The fork cannot be served: its VMM has to be killed.
    Failed(FailReason),
}

impl From<Violation> for End {
    fn from(violation: Violation) -> Self {
        Self::Failed(FailReason::Violation(violation))
    }
}

impl End {
    /// The template has no more bytes for this fork.
    fn template(error: SourceError) -> Self {
        Self::Failed(FailReason::Template(error))
    }
}

/// An install that was tried.
#[derive(Clone, Copy)]
struct Tried {
    outcome: Outcome,
    begun: Instant,
}

/// Faults that the kernel did not let us answer yet.
struct Retry {
    backoff: Backoff,
    since: Instant,
    /// At least one was for lack of memory, which must not last.
    out_of_memory: bool,
}

/// A fork that a worker serves: the one owner of its userfaultfd.
pub(super) struct ServedFork {
    pub(super) record: Arc<ForkRecord>,
    pub(super) uffd: Arc<Uffd>,
    pub(super) peer: Peer,
    /// The handshake socket, while the VMM keeps it open.
    pub(super) socket: Option<OwnedFd>,
    /// Its place in its worker.
    pub(super) slot: Slot,
    context: Arc<WorkerContext>,
    session: Session,
    template: Template,
    look_again: LookAgain,
    /// The last turn ended before all events were read. The kernel wakes the worker for new events only.
    unread: bool,
    reads: Reads,
    retry: Option<Retry>,
    fill: FillDriver,
    first_faults: FirstFaults,
}

impl ServedFork {
    /// Creates the fork in the slot `index`.
    pub(super) fn new(fork: NewFork, index: usize, context: Arc<WorkerContext>) -> Self {
        let NewFork {
            record,
            uffd,
            peer,
            socket,
            session,
        } = fork;
        Self {
            slot: Slot {
                index,
                serial: record.serial,
            },
            template: record.template.clone(),
            record,
            uffd: Arc::new(uffd),
            peer,
            socket: Some(socket),
            context,
            session,
            look_again: LookAgain::default(),
            unread: false,
            reads: Reads::default(),
            retry: None,
            fill: FillDriver::default(),
            first_faults: FirstFaults::default(),
        }
    }

    /// The address of a region that is registered for write protection, if there is one.
    ///
    /// Tracking the writes of a guest requires write-protected installs, copied zeros, and memory that is never
    /// unregistered. So such a fork could not be completed.
    pub(super) fn write_protected(&self) -> Result<Option<HostAddr>, Errno> {
        for region in self.record.regions.get().into_iter().flatten() {
            let start = region.memory().start();
            if let Some(page) = HostRange::new(start, region.page_size().len())
                && self.uffd.is_write_protected(page)?
            {
                return Ok(Some(start));
            }
        }
        Ok(None)
    }

    /// Reads events and answers them. With `alone`, checks a few more times for new ones if that paid off before: no
    /// other fork waits meanwhile.
    pub(super) fn serve(&mut self, alone: bool, scratch: &mut Scratch) -> Result<(), End> {
        // No event is read while a step is carried out elsewhere. A demand fault goes first, so the step ends soon.
        if self.fill.interrupt() {
            self.unread = true;
            return Ok(());
        }
        let read_at = self.take_events(scratch)?;
        self.answer(scratch, read_at)?;
        for _ in 0..LOOKS_PER_TURN {
            // The last read may not have got all events, but the worker is woken for events that come from now on.
            if !alone || !self.look_again.is_worth_it() {
                break;
            }
            let before = self.record.counters.demand.get();
            let read_at = self.take_events(scratch)?;
            let found = self.record.counters.demand.get() != before;
            self.look_again.note(found);
            if !found {
                break;
            }
            self.answer(scratch, read_at)?;
        }
        Ok(())
    }

    /// Reads events until there are none, or for one turn. Returns the time of the first read.
    fn take_events(&mut self, scratch: &mut Scratch) -> Result<Instant, End> {
        let mut first_read = None;
        self.unread = true;
        for _ in 0..READS_PER_TURN {
            let drained = self
                .uffd
                .read_events(&mut scratch.events)
                .map_err(|errno| kernel("read events", errno))?;
            scratch.read_clock_at = Instant::now();
            first_read.get_or_insert(scratch.read_clock_at);
            for event in scratch.events.drain() {
                match self.session.on_event(&event)? {
                    Noted::Fault { offset, page_size } => {
                        self.record.counters.demand.add(1);
                        self.first_faults
                            .note(offset, page_size, &self.template, &self.record.counters);
                    }
                    Noted::SameFault => self.record.counters.demand.add(1),
                    Noted::Removed { pages } => self.record.counters.removed.add(pages as u64),
                }
            }
            if drained == Drained::Yes {
                self.unread = false;
                break;
            }
        }
        Ok(first_read.unwrap_or_else(Instant::now))
    }

    fn answer(&mut self, scratch: &mut Scratch, since: Instant) -> Result<(), End> {
        while let Some(step) = self.session.next_step()? {
            match step {
                Step::Wake(range) => self.wake(range)?,
                Step::Install(install) => {
                    if !self.install_around(&install, scratch, since)? {
                        self.install_from_template(&install, scratch, since, None)?;
                    }
                    self.install_ahead(scratch, since)?;
                }
            }
        }
        Ok(())
    }

    /// Answers a fault, for the first time or after failed reads.
    fn install_from_template(
        &mut self,
        install: &Install,
        scratch: &mut Scratch,
        since: Instant,
        failed: Option<Box<Failed>>,
    ) -> Result<(), End> {
        let Content::Template(from) = install.content else {
            let tried = self.install_zeros(install);
            return self.finish(install, tried, since, scratch);
        };
        if let Some(tried) = self.copy_mapped(install, from, scratch)? {
            return self.finish(install, tried, since, scratch);
        }
        let buffer = scratch.bytes.first(install.bytes());
        let source = self.template.source();
        // Checked after reading and before the VMM gets the bytes, so they are the template's.
        let found = match source.try_read(from, buffer) {
            Ok(Page::NotReady) => Ok(None),
            Ok(page) => source.check_unchanged().map(|()| Some(page)),
            Err(error) => Err(error),
        };
        let tried = match found {
            Ok(Some(Page::Bytes(bytes))) => self.copy(install, bytes),
            Ok(Some(_)) => self.install_zeros(install),
            not_ready_or_failed => {
                self.session.await_bytes(install);
                if failed.is_none() {
                    self.record.counters.slow.add(1);
                }
                let awaited = Awaited::Fault(install.at);
                if let Err(error) = not_ready_or_failed {
                    return self.read_failed(awaited, failed, error);
                }
                self.read_later(awaited, from, install.bytes(), failed);
                return Ok(());
            }
        };
        self.finish(install, tried, since, scratch)
    }

    /// Copies pages straight from the mapped template, if they are known to be in memory and to be data.
    fn copy_mapped(&self, install: &Install, from: TemplateOffset, scratch: &Scratch) -> Result<Option<Tried>, End> {
        let len = install.to.len();
        if install.page_size != PageSize::Small
            || !self.template.zeros_are_known()
            || (install.pages == 1 && self.template.zeros().covers(from, len))
        {
            return Ok(None);
        }
        let Some(mapping) = self.template.mapping() else {
            return Ok(None);
        };
        let bytes = match mapping.known_resident(from, len) {
            Residency::Mapped(bytes) => bytes,
            Residency::MapFirst => {
                self.template.map_later(from);
                return Ok(None);
            }
            Residency::Unknown => return Ok(None),
        };
        let outcome = self.uffd.copy_mapped(install.to.start(), bytes);
        // The bytes were read by the install, so they can be checked only now. If they are not the template's, or the
        // check fails, the VMM is killed before it uses them.
        self.template.source().check_unchanged().map_err(End::template)?;
        Ok(Some(self.copied(install.to, outcome, scratch.read_clock_at)))
    }

    /// Copies bytes of the template.
    fn copy(&self, install: &Install, bytes: &[u8]) -> Tried {
        let (to, page_size) = (install.to, install.page_size);
        let begun = Instant::now();
        let outcome = self.uffd.copy(to.start(), bytes);
        let outcome = presence::settle(outcome, page_size, to, self.peer.pid);
        self.copied(to, outcome, begun)
    }

    fn copied(&self, to: HostRange, outcome: Outcome, begun: Instant) -> Tried {
        self.record.counters.installed_bytes.add(match outcome {
            Outcome::Installed => to.len().get(),
            Outcome::Retry { installed } => installed.get(),
            _ => 0,
        });
        Tried { outcome, begun }
    }

    fn install_zeros(&self, install: &Install) -> Tried {
        let begun = Instant::now();
        let outcome = match install.page_size {
            PageSize::Small => self.uffd.zeropage(install.to),
            // hugetlbfs has no zero page to share.
            PageSize::Huge => {
                let outcome = self.uffd.copy(install.to.start(), &self.context.zeros);
                presence::settle(outcome, install.page_size, install.to, self.peer.pid)
            }
        };
        if outcome == Outcome::Installed {
            self.record.counters.zero.add(1);
        }
        Tried { outcome, begun }
    }

    /// Handles the outcome of an install.
    fn finish(&mut self, install: &Install, tried: Tried, since: Instant, scratch: &mut Scratch) -> Result<(), End> {
        let outcome = tried.outcome;
        if outcome == Outcome::Installed {
            self.note_answered(&tried, since, scratch);
        }
        match self.session.on_outcome(install, outcome) {
            After::Done => Ok(()),
            After::Wake(range) => self.wake(range),
            After::Parked => {
                self.record.counters.retried.add(1);
                self.park(since, false)
            }
            After::OutOfMemory => self.park(since, true),
            After::PeerGone => Err(End::PeerGone),
            After::Failed(errno) => Err(kernel("install a page", errno)),
        }
    }

    /// Notes the time of an answer.
    fn note_answered(&self, tried: &Tried, since: Instant, scratch: &mut Scratch) {
        let counters = &self.record.counters;
        let now = Instant::now();
        scratch.read_clock_at = now;
        counters.fault_latency.record(now.duration_since(since));
        counters.install_latency.record(now.duration_since(tried.begun));
    }

    fn wake(&self, range: HostRange) -> Result<(), End> {
        self.uffd.wake(range).map_err(|errno| kernel("wake a page", errno))
    }

    /// Plans the next try of parked faults: soon at first, then ever later.
    fn park(&mut self, since: Instant, out_of_memory: bool) -> Result<(), End> {
        let deadline = self.context.fault_deadline;
        let now = Instant::now();
        let retry = self.retry.get_or_insert(Retry {
            backoff: Backoff::first(now),
            since,
            out_of_memory: false,
        });
        retry.backoff.lengthen(now);
        if !out_of_memory {
            retry.backoff.shorten(now);
        } else if !retry.out_of_memory {
            retry.backoff.wait_for_memory();
            retry.out_of_memory = true;
            retry.since = since;
        }
        if retry.out_of_memory && now.duration_since(retry.since) > deadline {
            return Err(End::Failed(FailReason::OutOfMemory { deadline }));
        }
        Ok(())
    }

    /// The time at which this fork needs a turn without an event.
    pub(super) fn next_turn(&self) -> Option<Instant> {
        let reads = self.reads.next_turn(self.context.fault_deadline);
        let may_read = !self.fill.is_elsewhere();
        let retry = self
            .retry
            .as_ref()
            .filter(|_| may_read)
            .map(|retry| retry.backoff.until());
        let unread = (self.unread && may_read).then(Instant::now);
        let first_faults = self.first_faults.next_look();
        reads
            .into_iter()
            .chain(retry)
            .chain(self.fill.paused_until())
            .chain(first_faults)
            .chain(unread)
            .min()
    }

    /// Ends the window of its first faults, if it is open, and reports the result.
    pub(super) fn end_first_faults(&mut self) {
        if let Some(mut shown) = self.first_faults.end(&self.record.counters) {
            if let Some(recording) = &mut shown.recording {
                recording.cut_short();
            }
            self.report(shown);
        }
    }

    /// Reports the results of its first faults.
    fn report(&self, shown: Shown) {
        let registry = &self.context.registry;
        let id = || self.record.id.clone();
        if let Some(recording) = shown.recording.map(Arc::new) {
            registry.observe(ForkEvent::Recorded { id: id(), recording });
        }
        if let Some(tally) = shown.tally {
            self.template.note_prefault(tally);
            registry.observe(ForkEvent::Prefaulted { id: id(), tally });
        }
    }

    /// Carries out everything that is due by `now`.
    pub(super) fn on_timer(&mut self, now: Instant, scratch: &mut Scratch) -> Result<(), End> {
        if let Some(shown) = self.first_faults.look(now, &self.record.counters) {
            self.report(shown);
        }
        self.look_after_reads(now, scratch)?;
        self.fill.on_timer(now);
        if self.fill.is_elsewhere() {
            return Ok(());
        }
        if self.unread {
            self.serve(false, scratch)?;
        }
        if let Some(retry) = self.retry.as_ref().filter(|retry| retry.backoff.until() <= now) {
            let since = retry.since;
            self.session.release_parked();
            // A fault is parked because of an event, such as a removal: read that first.
            self.take_events(scratch)?;
            self.answer(scratch, since)?;
            if !self.session.has_parked() {
                self.retry = None;
            }
        }
        Ok(())
    }
}

fn kernel(operation: &'static str, errno: Errno) -> End {
    End::Failed(FailReason::Kernel { operation, errno })
}
