//! One fork being served: carries out what its session decides.

mod completion;
mod eagerness;
mod fill_step;
mod filling;
mod lane;
mod pause;
mod presence;
mod reads;
mod watch;

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagecast_uffd::{Drained, Errno, EventBuffer, HostAddr, HostRange, Outcome, Peer, Uffd};

use super::failure::FailReason;
use super::fill_pool::FillPool;
use super::record::ForkRecord;
use super::worker::Slot;
use crate::page::PageSize;
use crate::session::{After, Content, Fill, Install, Noted, Session, Step, Violation};
use crate::template::{Page, ReadResult, SourceError, Template};
use eagerness::Eagerness;
pub(super) use fill_step::{FillStep, Filled};
use pause::Pause;
pub(super) use reads::ReadToken;
use reads::{Awaited, Failed, Reads};
use watch::Watch;
pub(super) use watch::Watched;

/// How many reads of events one turn takes before the other forks of the worker get theirs. The kernel does not let a
/// page be installed while a removal is unread, so stopping early is safe.
const READS_PER_TURN: usize = 8;

/// How often more a fork that is served alone is looked at in one turn.
const LOOKS_PER_TURN: usize = 8;

/// Where bytes go that were read elsewhere. Called on reading threads.
pub(super) type Deliver = Arc<dyn Fn(ReadToken, ReadResult) + Send + Sync>;

/// What the forks of one worker share: room to work in.
pub(super) struct Scratch {
    events: EventBuffer,
    /// The largest page or fill.
    bytes: Vec<u8>,
    /// A huge page of zeros, for memory that `UFFDIO_ZEROPAGE` does not work on. Never written, so it takes no memory.
    pub(super) zeros: Arc<Vec<u8>>,
    /// What the worker waits with: readable while there is something to look at.
    epoll: Arc<OwnedFd>,
    pub(super) fill_pool: Arc<FillPool>,
    deliver: Deliver,
    /// When the clock was looked at last. On the fault path this stands for now, where nothing worth a look came between.
    looked_at: Instant,
    /// How long a fault may wait for the template or for memory.
    pub(super) fault_deadline: Duration,
    /// Bytes a second.
    completion_rate: Option<NonZeroU64>,
}

impl Scratch {
    pub(super) fn new(
        deliver: Deliver,
        fill_pool: Arc<FillPool>,
        epoll: Arc<OwnedFd>,
        fault_deadline: Duration,
        completion_rate: Option<NonZeroU64>,
    ) -> Self {
        Self {
            events: EventBuffer::new(),
            bytes: vec![0; PageSize::Huge.as_usize()],
            zeros: Arc::new(vec![0; PageSize::Huge.as_usize()]),
            epoll,
            fill_pool,
            deliver,
            looked_at: Instant::now(),
            fault_deadline,
            completion_rate,
        }
    }
}

/// Why serving a fork ends.
pub(super) enum End {
    /// Its address space is gone.
    PeerGone,
    /// It has all its memory and is unregistered.
    Complete,
    /// It cannot be served: its VMM has to be killed.
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

/// Faults that the kernel would not let us answer.
struct Retry {
    pause: Pause,
    since: Instant,
    /// It was for lack of memory, which must not last.
    out_of_memory: bool,
}

/// A fork whose VMM has shaken hands: the one owner of its userfaultfd.
pub(super) struct ServedFork {
    pub(super) record: Arc<ForkRecord>,
    pub(super) uffd: Arc<Uffd>,
    pub(super) peer: Peer,
    /// The handshake socket, while the VMM keeps it open.
    pub(super) socket: Option<OwnedFd>,
    session: Session,
    template: Template,
    serial: u64,
    /// The index of its slot.
    pub(super) index: usize,
    eagerness: Eagerness,
    /// The last turn ended before all events were read. The worker is told of new ones only.
    unread: bool,
    reads: Reads,
    retry: Option<Retry>,
    /// Fills that were begun and not ended, for lack of room or because their mapping was split.
    fills: Vec<Fill>,
    /// The fill that waits for its bytes.
    reading: Option<Fill>,
    /// A fill whose bytes have come, and they.
    bytes_of_fill: Option<(Fill, Arc<Vec<u8>>)>,
    /// How often what was begun was dropped: fills from before that are not carried on with.
    fill_plan: u64,
    /// A step of filling is carried out elsewhere, and this tells it to stop. No event is read meanwhile.
    filled_elsewhere: Option<Arc<AtomicBool>>,
    fill_pause: Option<Instant>,
    /// The kernel would not let fills go on, nor the fork be unregistered.
    fill_retry: Option<Pause>,
    /// Somebody waits for its completion.
    at_once: bool,
    watch: Watch,
    watched: Option<Watched>,
    /// All regions are unregistered; what is left is to be sure that nobody waits for us.
    unregistered: bool,
    given_up: Option<Arc<FailReason>>,
}

impl ServedFork {
    pub(super) fn new(
        record: Arc<ForkRecord>,
        uffd: Uffd,
        peer: Peer,
        socket: OwnedFd,
        session: Session,
        serial: u64,
    ) -> Self {
        Self {
            template: record.template.clone(),
            record,
            uffd: Arc::new(uffd),
            peer,
            socket: Some(socket),
            session,
            serial,
            index: 0,
            eagerness: Eagerness::default(),
            unread: false,
            reads: Reads::default(),
            retry: None,
            fills: Vec::new(),
            reading: None,
            bytes_of_fill: None,
            fill_plan: 0,
            filled_elsewhere: None,
            fill_pause: None,
            fill_retry: None,
            at_once: false,
            watch: Watch::default(),
            watched: None,
            unregistered: false,
            given_up: None,
        }
    }

    /// Its place in its worker.
    pub(super) fn slot(&self) -> Slot {
        Slot {
            index: self.index,
            serial: self.serial,
        }
    }

    /// Whether a region of its memory is registered for write protection, and where that region begins.
    ///
    /// Tracking the writes of a guest takes every page to be installed write-protected, zeros to be copied, and no memory to
    /// be unregistered ever, so that the fork could not be completed.
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

    /// Reads what has happened and answers it; with `alone`, looks a few times more whether there is already something new,
    /// where that was worth it before: no other fork waits meanwhile.
    pub(super) fn serve(&mut self, alone: bool, scratch: &mut Scratch) -> Result<(), End> {
        if let Some(stop) = &self.filled_elsewhere {
            // A demand fault goes first: the step ends with the fill that it is at.
            stop.store(true, Ordering::Relaxed);
            self.unread = true;
            return Ok(());
        }
        let read_at = self.take_events(scratch)?;
        self.answer(scratch, read_at)?;
        for _ in 0..LOOKS_PER_TURN {
            // What is read last is not known to be all, but the worker is told of whatever comes from now on.
            if !alone || !self.eagerness.is_worth_a_look() {
                break;
            }
            let before = self.record.counters.demand.get();
            let read_at = self.take_events(scratch)?;
            let found = self.record.counters.demand.get() != before;
            self.eagerness.note(found);
            if !found {
                break;
            }
            self.answer(scratch, read_at)?;
        }
        Ok(())
    }

    /// Reads events until there are none, or for one turn. Returns when the first read was done.
    fn take_events(&mut self, scratch: &mut Scratch) -> Result<Instant, End> {
        let mut first_read = None;
        self.unread = true;
        for _ in 0..READS_PER_TURN {
            let drained = self
                .uffd
                .read_events(&mut scratch.events)
                .map_err(|errno| kernel("read events", errno))?;
            scratch.looked_at = Instant::now();
            first_read.get_or_insert(scratch.looked_at);
            for event in scratch.events.drain() {
                match self.session.on_event(&event)? {
                    Noted::Fault { offset, page_size } => {
                        self.record.counters.demand.add(1);
                        self.watch
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
                Step::Install(install) => self.install_from_template(&install, scratch, since, None)?,
            }
        }
        Ok(())
    }

    /// Answers a fault, for the first time or after tries to read that failed.
    fn install_from_template(
        &mut self,
        install: &Install,
        scratch: &mut Scratch,
        since: Instant,
        failed: Option<Box<Failed>>,
    ) -> Result<(), End> {
        let Content::Template(from) = install.content else {
            let tried = self.install_zeros(install, &scratch.zeros);
            return self.finish(install, tried, since, scratch);
        };
        if install.page_size == PageSize::Small
            && self.template.zeros_are_known()
            && let Some(mapping) = self.template.mapping()
            && let Some(bytes) = mapping.resident_page(from)
        {
            let outcome = self.uffd.copy_mapped(install.to.start(), bytes);
            // It was read as it was installed, so only now can be told what it is. If it is not the template's, or that cannot
            // be told, its VMM does not live to use it.
            self.template.source().check_unchanged().map_err(End::template)?;
            let tried = self.copied(install.to, outcome, scratch.looked_at);
            return self.finish(install, tried, since, scratch);
        }
        let buffer = room(&mut scratch.bytes, install.bytes());
        let source = self.template.source();
        // After reading, before anybody sees it: what was read is the template's.
        let found = match source.try_read(from, buffer) {
            Ok(Page::NotReady) => Ok(None),
            Ok(page) => source.check_unchanged().map(|()| Some(page)),
            Err(error) => Err(error),
        };
        let tried = match found {
            Ok(Some(Page::Bytes(bytes))) => self.copy(install, bytes),
            Ok(Some(_)) => self.install_zeros(install, &scratch.zeros),
            not_ready_or_failed => {
                self.session.await_bytes(install);
                if failed.is_none() {
                    self.record.counters.slow.add(1);
                }
                let awaited = Awaited::Fault(install.at);
                if let Err(error) = not_ready_or_failed {
                    return self.read_failed(awaited, failed, error);
                }
                self.read_later(awaited, from, install.bytes(), failed, &scratch.deliver);
                return Ok(());
            }
        };
        self.finish(install, tried, since, scratch)
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

    fn install_zeros(&self, install: &Install, zeros: &[u8]) -> Tried {
        let begun = Instant::now();
        let outcome = match install.page_size {
            PageSize::Small => self.uffd.zeropage(install.to),
            // hugetlbfs has no zero page to share.
            PageSize::Huge => {
                let outcome = self.uffd.copy(install.to.start(), zeros);
                presence::settle(outcome, install.page_size, install.to, self.peer.pid)
            }
        };
        if outcome == Outcome::Installed {
            self.record.counters.zero.add(1);
        }
        Tried { outcome, begun }
    }

    /// Does what the outcome of an install asks for.
    fn finish(&mut self, install: &Install, tried: Tried, since: Instant, scratch: &mut Scratch) -> Result<(), End> {
        let Tried { outcome, begun } = tried;
        let counters = &self.record.counters;
        if outcome == Outcome::Installed {
            let now = Instant::now();
            scratch.looked_at = now;
            counters.fault_latency.record(now.duration_since(since));
            counters.install_latency.record(now.duration_since(begun));
        }
        match self.session.on_outcome(install, outcome) {
            After::Done => Ok(()),
            After::Wake(range) => self.wake(range),
            After::Parked => {
                counters.retried.add(1);
                self.park(since, false, scratch.fault_deadline)
            }
            After::OutOfMemory => self.park(since, true, scratch.fault_deadline),
            After::PeerGone => Err(End::PeerGone),
            After::Failed(errno) => Err(kernel("install a page", errno)),
        }
    }

    fn wake(&self, range: HostRange) -> Result<(), End> {
        self.uffd.wake(range).map_err(|errno| kernel("wake a page", errno))
    }

    /// Plans the next try of what is parked: soon at first, then ever less often.
    fn park(&mut self, since: Instant, out_of_memory: bool, deadline: Duration) -> Result<(), End> {
        let now = Instant::now();
        let retry = self.retry.get_or_insert(Retry {
            pause: Pause::first(now),
            since,
            out_of_memory: false,
        });
        retry.pause.lengthen(now);
        if !out_of_memory {
            retry.pause.shorten(now);
        } else if !retry.out_of_memory {
            retry.pause.wait_for_memory();
            retry.out_of_memory = true;
            retry.since = since;
        }
        if retry.out_of_memory && now.duration_since(retry.since) > deadline {
            return Err(End::Failed(FailReason::OutOfMemory { deadline }));
        }
        Ok(())
    }

    /// When this fork wants a turn though nothing happens.
    pub(super) fn next_turn(&self, fault_deadline: Duration) -> Option<Instant> {
        let reads = self.reads.next_turn(fault_deadline);
        let may_read = self.filled_elsewhere.is_none();
        let retry = self
            .retry
            .as_ref()
            .filter(|_| may_read)
            .map(|retry| retry.pause.until());
        let unread = (self.unread && may_read).then(Instant::now);
        let watch = self.watch.next_look();
        reads
            .into_iter()
            .chain(retry)
            .chain(self.fill_pause)
            .chain(watch)
            .chain(unread)
            .min()
    }

    /// What its first faults have shown, once.
    pub(super) fn take_watched(&mut self) -> Option<Watched> {
        self.watched.take()
    }

    /// The same, where it ends before that was over.
    pub(super) fn end_watch(&mut self) -> Option<Watched> {
        let mut watched = self.watch.end(&self.record.counters)?;
        if let Some(recording) = &mut watched.recording {
            recording.cut_short();
        }
        Some(watched)
    }

    /// Does what is due by now.
    pub(super) fn on_timer(&mut self, now: Instant, scratch: &mut Scratch) -> Result<(), End> {
        if let Some(watched) = self.watch.look(now, &self.record.counters) {
            self.watched = Some(watched);
        }
        self.look_after_reads(now, scratch)?;
        if self.fill_pause.is_some_and(|until| until <= now) {
            self.fill_pause = None;
        }
        if self.filled_elsewhere.is_some() {
            return Ok(());
        }
        if self.unread {
            self.serve(false, scratch)?;
        }
        if let Some(retry) = self.retry.as_ref().filter(|retry| retry.pause.until() <= now) {
            let since = retry.since;
            self.session.release_parked();
            // Whatever is parked was parked because something happened: hear of it first.
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

/// The first `length` bytes of `bytes`, which grows to hold them where it must (it is as long as the largest page, so
/// it never does on the fault path).
fn room(bytes: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if bytes.len() < length {
        bytes.resize(length, 0);
    }
    bytes.get_mut(..length).unwrap_or_default()
}
