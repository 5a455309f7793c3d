//! What a fork waits for that is read elsewhere, and reads that failed and are tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;

use super::backoff::Backoff;
use super::{End, Scratch, ServedFork};
use crate::server::fail_reason::FailReason;
use crate::server::worker::{Message, Slot};
use crate::session::{Content, PageRef, Step};
use crate::template::{ReadFor, ReadResult, SourceError, TemplateOffset, leading_zero_pages};

/// Which read of which fork of a worker some bytes are for. Places are used again, numbers are not.
#[derive(Clone, Copy, Debug)]
pub(in crate::server) struct ReadToken {
    pub(in crate::server) slot: Slot,
    /// The place of the read in the fork, and its number.
    place: usize,
    number: u64,
}

/// What is read for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    Fault(PageRef),
    /// The fill that waits for its bytes.
    Fill,
}

/// Tries to read that failed, and may not fail the next time.
#[derive(Debug)]
pub(super) struct Failed {
    /// When the bytes were asked for first.
    since: Instant,
    tries: u32,
    last: SourceError,
    /// Before the next try.
    backoff: Backoff,
}

impl Failed {
    /// One more try has failed.
    fn again(earlier: Option<Box<Self>>, error: SourceError, now: Instant) -> Self {
        let Some(mut failed) = earlier.map(|failed| *failed) else {
            return Self {
                since: now,
                tries: 1,
                last: error,
                backoff: Backoff::first_read(now),
            };
        };
        failed.tries = failed.tries.saturating_add(1);
        failed.last = error;
        failed.backoff.lengthen(now);
        failed
    }

    fn reason(self, now: Instant) -> FailReason {
        let time = now.duration_since(self.since);
        FailReason::ReadFailed {
            tries: self.tries,
            time: Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            source: self.last,
        }
    }
}

/// A read that has not come to an end.
#[derive(Debug)]
struct Read {
    number: u64,
    awaited: Awaited,
    since: Instant,
    failed: Option<Box<Failed>>,
    /// A reading thread has it. Else it failed, and waits for the next try.
    is_asked: bool,
}

impl Read {
    fn next_turn(&self, deadline: Duration) -> Instant {
        let overdue = self.since + deadline;
        match &self.failed {
            Some(failed) if !self.is_asked => overdue.min(failed.backoff.until()),
            _ => overdue,
        }
    }
}

/// All reads of a fork that have not come to an end.
#[derive(Debug, Default)]
pub(super) struct Reads {
    all: Slab<Read>,
    /// How many there have been.
    count: u64,
    /// A thread for them could not be had.
    short_of_threads: Option<Backoff>,
}

impl Reads {
    /// Notes a read: its place and its number.
    fn insert(&mut self, awaited: Awaited, failed: Option<Box<Failed>>, is_asked: bool) -> (usize, u64) {
        self.count += 1;
        let place = self.all.insert(Read {
            number: self.count,
            awaited,
            since: failed.as_ref().map_or_else(Instant::now, |failed| failed.since),
            failed,
            is_asked,
        });
        (place, self.count)
    }

    fn take(&mut self, place: usize, number: u64) -> Option<Read> {
        self.all.get(place).filter(|read| read.number == number)?;
        self.all.try_remove(place)
    }

    /// The first read of which this holds.
    fn take_if(&mut self, holds: impl Fn(&Read) -> bool) -> Option<Read> {
        let (place, _) = self.all.iter().find(|(_, read)| holds(read))?;
        self.all.try_remove(place)
    }

    /// When something is due: a deadline, a next try.
    pub(super) fn next_turn(&self, deadline: Duration) -> Option<Instant> {
        let reads = self.all.iter().map(|(_, read)| read.next_turn(deadline));
        reads.chain(self.short_of_threads.map(|backoff| backoff.until())).min()
    }

    /// What is read for a fill is not wanted any more.
    pub(super) fn forget_fill(&mut self) {
        self.all.retain(|_, read| read.awaited != Awaited::Fill);
    }
}

impl ServedFork {
    /// Has bytes read elsewhere: for the first time, or again.
    pub(super) fn read_later(
        &mut self,
        awaited: Awaited,
        from: TemplateOffset,
        length: usize,
        failed: Option<Box<Failed>>,
    ) {
        let (place, number) = self.reads.insert(awaited, failed, true);
        let token = ReadToken {
            slot: self.slot,
            place,
            number,
        };
        let read_for = match awaited {
            Awaited::Fault(_) => ReadFor::Demand,
            Awaited::Fill => ReadFor::Fill,
        };
        let inbox = Arc::clone(&self.context.inbox);
        let deliver = move |bytes| inbox.send(Message::Bytes { token, bytes });
        let has_threads = self.template.read_later(from, length, read_for, deliver);
        if !has_threads {
            let first = || Backoff::first_read(Instant::now());
            self.reads.short_of_threads.get_or_insert_with(first);
        }
    }

    /// Bytes could not be had. Where that may pass they are asked for again after a pause, until the deadline.
    pub(super) fn read_failed(
        &mut self,
        awaited: Awaited,
        earlier: Option<Box<Failed>>,
        error: SourceError,
    ) -> Result<(), End> {
        if error.may_pass() {
            let failed = Box::new(Failed::again(earlier, error, Instant::now()));
            self.reads.insert(awaited, Some(failed), false);
            return Ok(());
        }
        match (awaited, error) {
            // Nobody waits for what a fill reads, so where it merely cannot be read nobody has to die for it.
            (Awaited::Fill, error @ SourceError::Unreadable { .. }) => {
                self.give_up_filling(FailReason::Template(error));
                Ok(())
            }
            // A template that is not what it was has no more bytes for anybody.
            (_, error) => Err(End::template(error)),
        }
    }

    /// Bytes that were read elsewhere have come, or cannot.
    pub(in crate::server) fn on_bytes(
        &mut self,
        token: ReadToken,
        bytes: ReadResult,
        scratch: &mut Scratch,
    ) -> Result<(), End> {
        let Some(read) = self.reads.take(token.place, token.number) else {
            return Ok(());
        };
        // After reading, before anybody sees it: what was read is the template's.
        let bytes = match bytes.and_then(|bytes| self.template.check().map(|()| bytes)) {
            Ok(bytes) => bytes,
            Err(error) => return self.read_failed(read.awaited, read.failed, error),
        };
        let at = match read.awaited {
            Awaited::Fault(at) => at,
            Awaited::Fill => {
                self.fill.bytes_ready(bytes);
                return Ok(());
            }
        };
        match self.session.bytes_ready(at)? {
            None => Ok(()),
            Some(Step::Wake(range)) => self.wake(range),
            Some(Step::Install(install)) => {
                let zeros =
                    matches!(install.content, Content::Zeros) || leading_zero_pages(&bytes, install.page_size).0;
                let tried = if zeros {
                    self.install_zeros(&install)
                } else {
                    self.copy(&install, &bytes)
                };
                self.finish(&install, tried, read.since, scratch)
            }
        }
    }

    /// Ends what has waited for too long, and tries again what is due.
    pub(super) fn look_after_reads(&mut self, now: Instant, scratch: &mut Scratch) -> Result<(), End> {
        let deadline = self.context.fault_deadline;
        while let Some(read) = self.reads.take_if(|read| read.since + deadline <= now) {
            let reason = match read.failed {
                Some(failed) => failed.reason(now),
                None => FailReason::ReadDeadline { deadline },
            };
            match read.awaited {
                Awaited::Fault(_) => return Err(End::Failed(reason)),
                // Nobody waits for what a fill reads, so nobody has to die for it.
                Awaited::Fill => self.give_up_filling(reason),
            }
        }
        // Each of those that fail again waits for a time that is not due.
        while let Some(read) = self.reads.take_if(|read| read.next_turn(deadline) <= now) {
            self.try_again(read, scratch)?;
        }
        if let Some(mut backoff) = self
            .reads
            .short_of_threads
            .take()
            .filter(|_| !self.reads.all.is_empty())
            && (now < backoff.until() || !self.template.start_wanted_readers())
        {
            backoff.lengthen(now);
            self.reads.short_of_threads = Some(backoff);
        }
        Ok(())
    }

    fn try_again(&mut self, read: Read, scratch: &mut Scratch) -> Result<(), End> {
        let at = match read.awaited {
            Awaited::Fault(at) => at,
            Awaited::Fill => {
                if let Some((from, length)) = self.fill.waiting_for_bytes().map(|fill| (fill.from, fill.bytes())) {
                    self.read_later(Awaited::Fill, from, length, read.failed);
                }
                return Ok(());
            }
        };
        // It may have been removed or installed since, and then needs no bytes.
        match self.session.bytes_ready(at)? {
            None => Ok(()),
            Some(Step::Wake(range)) => self.wake(range),
            Some(Step::Install(install)) => self.install_from_template(&install, scratch, read.since, read.failed),
        }
    }
}
