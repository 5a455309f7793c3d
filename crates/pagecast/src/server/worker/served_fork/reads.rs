//! The reads on other threads that a fork waits for, and failed reads that are tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;

use super::backoff::Backoff;
use super::{End, Scratch, ServedFork};
use crate::server::fork::FailReason;
use crate::server::worker::message::{Message, ReadToken};
use crate::session::{Content, PageRef, Step};
use crate::template::{ReadFor, ReadResult, SourceError, TemplateOffset, leading_zero_pages};

/// The purpose of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    Fault(PageRef),
    /// The fill that waits for its bytes.
    Fill,
}

/// Failed tries of a read that may succeed the next time.
#[derive(Debug)]
pub(super) struct Failed {
    /// The time of the first request for the bytes.
    since: Instant,
    tries: u32,
    last: SourceError,
    /// The pause before the next try.
    backoff: Backoff,
}

impl Failed {
    /// Counts one more failed try.
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

/// A read that has not ended.
#[derive(Debug)]
struct Read {
    number: u64,
    awaited: Awaited,
    since: Instant,
    failed: Option<Box<Failed>>,
    /// A reading thread has it. Otherwise it failed, and waits for the next try.
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

/// All reads of a fork that have not ended.
#[derive(Debug, Default)]
pub(super) struct Reads {
    all: Slab<Read>,
    /// The number of reads so far.
    count: u64,
    /// A thread for them could not be started.
    short_of_threads: Option<Backoff>,
}

impl Reads {
    /// Notes a read. Returns its place and its number.
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

    /// Removes the first read for which `holds` returns `true`.
    fn take_if(&mut self, holds: impl Fn(&Read) -> bool) -> Option<Read> {
        let (place, _) = self.all.iter().find(|(_, read)| holds(read))?;
        self.all.try_remove(place)
    }

    /// The time of the next deadline or try.
    pub(super) fn next_turn(&self, deadline: Duration) -> Option<Instant> {
        let reads = self.all.iter().map(|(_, read)| read.next_turn(deadline));
        reads.chain(self.short_of_threads.map(|backoff| backoff.until())).min()
    }

    /// Forgets the read for a fill, which is not wanted any more.
    pub(super) fn forget_fill(&mut self) {
        self.all.retain(|_, read| read.awaited != Awaited::Fill);
    }
}

impl ServedFork {
    /// Has bytes read on another thread: for the first time, or again.
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

    /// Handles a failed read. If the failure may pass, it is retried after a pause, until the deadline.
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
            // No thread waits for the bytes of a fill, so a VMM need not die if they merely cannot be read.
            (Awaited::Fill, error @ SourceError::Unreadable { .. }) => {
                self.give_up_filling(FailReason::Template(error));
                Ok(())
            }
            // A template that has changed has no more bytes for any fork.
            (_, error) => Err(End::template(error)),
        }
    }

    /// Handles the result of a read on another thread.
    pub(in crate::server::worker) fn on_bytes(
        &mut self,
        token: ReadToken,
        bytes: ReadResult,
        scratch: &mut Scratch,
    ) -> Result<(), End> {
        let Some(read) = self.reads.take(token.place, token.number) else {
            return Ok(());
        };
        // Checked after reading and before the VMM gets the bytes, so they are the template's.
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

    /// Ends reads that have waited for too long, and retries those that are due.
    pub(super) fn look_after_reads(&mut self, now: Instant, scratch: &mut Scratch) -> Result<(), End> {
        let deadline = self.context.fault_deadline;
        while let Some(read) = self.reads.take_if(|read| read.since + deadline <= now) {
            let reason = match read.failed {
                Some(failed) => failed.reason(now),
                None => FailReason::ReadDeadline { deadline },
            };
            match read.awaited {
                Awaited::Fault(_) => return Err(End::Failed(reason)),
                // No thread waits for the bytes of a fill, so no VMM need die.
                Awaited::Fill => self.give_up_filling(reason),
            }
        }
        // A read that fails again gets a time that is not due yet.
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
        // The page may have been removed or installed meanwhile, and then needs no bytes.
        match self.session.bytes_ready(at)? {
            None => Ok(()),
            Some(Step::Wake(range)) => self.wake(range),
            Some(Step::Install(install)) => self.install_from_template(&install, scratch, read.since, read.failed),
        }
    }
}
