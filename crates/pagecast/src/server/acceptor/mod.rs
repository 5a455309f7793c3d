//! The thread that listens, accepts and carries out the handshakes with VMMs, so that no worker has to.
//!
//! A connection that sends a file descriptor is a VMM: its fork is then either served, or has failed with a reason. A
//! connection that ends before that is refused and reported, and its fork waits on.

mod handshaking;
mod listener;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecast_uffd::PeerCredentials;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use slab::Slab;

use super::admission;
use super::deadlines::Deadlines;
use super::disposal::Disposal;
use super::fork::{FailReason, ForkEvent, ForkState, Refusal};
use super::inbox::Inbox;
use super::registry::{ForkRecord, Holder, Registry, Requested};
use super::worker::NewFork;
use super::workers::Workers;
use crate::session::Session;
use handshaking::{Handshaken, Handshaking, visible};
pub(super) use listener::{Listener, Serves};

const EPOLL_EVENTS: usize = 64;
const INBOX: u64 = u64::MAX;

/// How long to accept no connection if there is no file descriptor left for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Requests of other threads to the acceptor.
pub(super) enum Request {
    Listen(Listener),
    /// Take no VMM for this fork any more.
    Close(Arc<ForkRecord>),
    /// Take no VMM any more, and stop.
    Stop,
}

/// The acceptor as the thread that has forks which wait for their VMM. `inbox` is that of the acceptor.
pub(super) fn holder(inbox: &Arc<Inbox<Request>>) -> Holder {
    let inbox = Arc::clone(inbox);
    Holder::new(move |record| inbox.send(Request::Close(Arc::clone(record))))
}

enum Entry {
    Listener(Listener),
    Handshaking {
        handshaking: Box<Handshaking>,
        /// The slot of the listener that it came through. The listener stays as long as this handshake.
        listener: usize,
    },
}

/// The kind of an [`Entry`], known while the entry is not borrowed.
enum Kind {
    Listener,
    Handshaking,
}

pub(super) struct Acceptor {
    epoll: OwnedFd,
    inbox: Arc<Inbox<Request>>,
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    disposal: Arc<Disposal>,
    deadlines: Deadlines,
    entries: Slab<Entry>,
    /// No connection is accepted until then.
    paused: Option<Instant>,
    stopping: bool,
}

impl Acceptor {
    /// Starts the acceptor thread, which reads `inbox`.
    pub(super) fn start(
        inbox: Arc<Inbox<Request>>,
        registry: Arc<Registry>,
        workers: Arc<Workers>,
        disposal: Arc<Disposal>,
        deadlines: Deadlines,
    ) -> std::io::Result<std::thread::JoinHandle<()>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*inbox, EventData::new_u64(INBOX), EventFlags::IN)?;
        let acceptor = Self {
            epoll,
            inbox,
            registry,
            workers,
            disposal,
            deadlines,
            entries: Slab::new(),
            paused: None,
            stopping: false,
        };
        std::thread::Builder::new()
            .name("pagecast-accept".to_owned())
            .spawn(move || acceptor.run())
    }

    fn run(mut self) {
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); EPOLL_EVENTS];
        while !self.stopping {
            let timeout = self.timeout();
            let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
                Ok((events, _)) => &*events,
                // Only EINTR is possible for our own epoll.
                Err(_) => continue,
            };
            let mut has_messages = false;
            for event in events {
                match event.data.u64() {
                    INBOX => has_messages = true,
                    slot => {
                        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
                        match self.kind(slot) {
                            Some(Kind::Listener) => self.accept(slot),
                            Some(Kind::Handshaking) => self.receive(slot),
                            None => {}
                        }
                    }
                }
            }
            if has_messages {
                self.read_messages();
            }
            self.run_timers();
        }
        self.close_all();
    }

    fn kind(&self, slot: usize) -> Option<Kind> {
        self.entries.get(slot).map(|entry| match entry {
            Entry::Listener(_) => Kind::Listener,
            Entry::Handshaking { .. } => Kind::Handshaking,
        })
    }

    fn read_messages(&mut self) {
        let inbox = Arc::clone(&self.inbox);
        for request in inbox.take() {
            match request {
                Request::Listen(listener) => self.listen(listener),
                Request::Close(record) => self.close(&record),
                Request::Stop => self.stopping = true,
            }
        }
    }

    fn listen(&mut self, listener: Listener) {
        if listener.one().is_some_and(|record| record.state().is_end()) {
            // The fork ended before the listener came here.
            return self.disposal.remove_later(listener.socket);
        }
        let flags = self.listener_flags(&listener);
        let entry = self.entries.vacant_entry();
        let data = EventData::new_u64(entry.key() as u64);
        match epoll::add(&self.epoll, &listener.socket, data, flags) {
            Ok(()) => {
                entry.insert(Entry::Listener(listener));
            }
            Err(errno) => {
                let record = listener.one().cloned();
                self.disposal.remove_later(listener.socket);
                if let Some(record) = record {
                    let reason = FailReason::Kernel {
                        operation: "watch a socket",
                        errno: errno.into(),
                    };
                    self.registry.end(&record, ForkState::Failed, Some(Arc::new(reason)));
                }
            }
        }
    }

    fn close(&mut self, record: &Arc<ForkRecord>) {
        for slot in self.slots(|entry| is_listener_of(entry, record)) {
            self.remove_listener(slot);
        }
        // Otherwise its VMM has completed the handshake meanwhile and is served: only this thread ends the waiting.
        if record.state() == ForkState::Waiting {
            let reason = match record.requested() {
                // There is no VMM to kill.
                Requested::Kill(reason) if !matches!(*reason, FailReason::Killed) => reason,
                _ => Arc::new(FailReason::Closed),
            };
            self.registry.end(record, ForkState::Failed, Some(reason));
        }
    }

    fn close_all(&mut self) {
        for slot in self.slots(|entry| matches!(entry, Entry::Handshaking { .. })) {
            self.conclude(slot, Err(Refusal::Closing));
        }
        for slot in self.slots(|entry| matches!(entry, Entry::Listener(_))) {
            if let Some(record) = self.remove_listener(slot) {
                let reason = Arc::new(FailReason::Closed);
                self.registry.end(&record, ForkState::Failed, Some(reason));
            }
        }
    }

    fn slots(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<usize> {
        let entries = self.entries.iter().filter(|(_, entry)| wanted(entry));
        entries.map(|(slot, _)| slot).collect()
    }

    fn listener(&mut self, slot: usize) -> Option<&mut Listener> {
        match self.entries.get_mut(slot) {
            Some(Entry::Listener(listener)) => Some(listener),
            _ => None,
        }
    }

    /// Closes a socket, removes its file and refuses the handshakes that are under way there. Returns the fork, if the
    /// socket was for one.
    fn remove_listener(&mut self, slot: usize) -> Option<Arc<ForkRecord>> {
        for other in self.slots(|entry| matches!(entry, Entry::Handshaking { listener, .. } if *listener == slot)) {
            if let Some((handshaking, listener)) = self.remove_handshake(other) {
                let pid = handshaking.pid();
                self.disposal.drop_later(handshaking);
                self.refuse(listener, pid, Refusal::TooLate);
            }
        }
        let Some(Entry::Listener(listener)) = self.entries.try_remove(slot) else {
            return None;
        };
        let _ = epoll::delete(&self.epoll, &listener.socket);
        let record = listener.one().cloned();
        self.disposal.remove_later(listener.socket);
        record
    }

    /// Removes a handshake. Returns it with the slot of its listener.
    fn remove_handshake(&mut self, slot: usize) -> Option<(Box<Handshaking>, usize)> {
        if !matches!(self.kind(slot), Some(Kind::Handshaking)) {
            return None;
        }
        let Some(Entry::Handshaking { handshaking, listener }) = self.entries.try_remove(slot) else {
            return None;
        };
        // Closing the socket would do, since there is no other copy of it; being sure costs nothing.
        let _ = epoll::delete(&self.epoll, &*handshaking);
        self.count_handshake(listener, Listener::end_handshake);
        Some((handshaking, listener))
    }

    fn count_handshake(&mut self, slot: usize, change: impl FnOnce(&mut Listener)) {
        let Some(listener) = self.listener(slot) else { return };
        let had_room = listener.has_room();
        change(listener);
        if listener.has_room() != had_room {
            self.watch(slot);
        }
    }

    fn listener_flags(&self, listener: &Listener) -> EventFlags {
        if listener.has_room() && self.paused.is_none() {
            EventFlags::IN
        } else {
            EventFlags::empty()
        }
    }

    /// Watches a listener for connections, if one could be accepted now.
    fn watch(&mut self, slot: usize) {
        if let Some(Entry::Listener(listener)) = self.entries.get(slot) {
            let data = EventData::new_u64(slot as u64);
            let _ = epoll::modify(&self.epoll, &listener.socket, data, self.listener_flags(listener));
        }
    }

    fn pause(&mut self, until: Option<Instant>) {
        self.paused = until;
        for slot in self.slots(|entry| matches!(entry, Entry::Listener(_))) {
            self.watch(slot);
        }
    }

    fn accept(&mut self, slot: usize) {
        if self.paused.is_some() {
            return;
        }
        let Some(listener) = self.listener(slot) else { return };
        let user = listener.user;
        match listener.socket.accept() {
            Ok(stream) => self.begin_handshake(stream, slot, user),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // The peer is gone, or there is no file descriptor left. The connection stays in the queue and would wake
            // us at once.
            Err(_) => self.pause(Some(Instant::now() + ACCEPT_PAUSE)),
        }
    }

    fn begin_handshake(&mut self, stream: UnixStream, listener: usize, user: u32) {
        let deadline = Instant::now() + self.deadlines.handshake;
        let credentials = match PeerCredentials::of(stream.as_fd()) {
            Ok(credentials) => credentials,
            Err(error) => {
                self.disposal.drop_later(stream);
                let message = error.to_string();
                return self.refuse(listener, None, Refusal::Unknown { message });
            }
        };
        let handshaking = match Handshaking::new(stream, credentials, user, deadline) {
            Ok(handshaking) => Box::new(handshaking),
            Err((stream, refusal)) => {
                self.disposal.drop_later(stream);
                return self.refuse(listener, visible(credentials.pid), refusal);
            }
        };
        let entry = self.entries.vacant_entry();
        let slot = entry.key();
        let data = EventData::new_u64(slot as u64);
        match epoll::add(&self.epoll, &*handshaking, data, EventFlags::IN) {
            Ok(()) => {
                entry.insert(Entry::Handshaking { handshaking, listener });
                self.count_handshake(listener, Listener::begin_handshake);
                // Firecracker has usually sent its message by now.
                self.receive(slot);
            }
            Err(errno) => {
                self.disposal.drop_later(handshaking);
                let refusal = Refusal::Socket { errno: errno.into() };
                self.refuse(listener, visible(credentials.pid), refusal);
            }
        }
    }

    fn receive(&mut self, slot: usize) {
        let Some(Entry::Handshaking { handshaking, .. }) = self.entries.get_mut(slot) else {
            return;
        };
        match handshaking.receive() {
            Ok(false) => {}
            Ok(true) => self.conclude(slot, Ok(())),
            Err(refusal) => self.conclude(slot, Err(refusal)),
        }
    }

    /// Ends a handshake whose message is complete or was refused. If a file descriptor was sent, the fork is served or
    /// has failed. If not, the connection is refused, and the fork waits on.
    fn conclude(&mut self, slot: usize, received: Result<(), Refusal>) {
        let Some((mut handshaking, listener)) = self.remove_handshake(slot) else {
            return;
        };
        let pid = handshaking.pid();
        if !handshaking.has_sent_fd() {
            self.disposal.drop_later(handshaking);
            return self.refuse(listener, pid, received.err().unwrap_or(Refusal::NoFd));
        }
        let registry = Arc::clone(&self.registry);
        let Some(open) = self.listener(listener) else { return };
        let is_for_one = open.one().is_some();
        let Some(record) = open.fork(&registry) else { return };
        if let Some(pid) = pid {
            record.set_pid(pid);
        }
        let checked = received
            .and_then(|()| handshaking.check(&record.template))
            .and_then(|layout| admission::admit(&registry, &layout).map(|()| layout));
        if is_for_one {
            self.remove_listener(listener);
        }
        match checked {
            Ok(layout) => {
                // Never `None`: the check has found both parts.
                if let Some(handshaken) = handshaking.into_handshaken(layout) {
                    self.hand_over(record, handshaken);
                }
            }
            Err(refusal) => {
                self.disposal.drop_later(handshaking);
                let reason = Arc::new(FailReason::Refused(refusal));
                registry.end(&record, ForkState::Failed, Some(reason));
            }
        }
    }

    /// Gives a fork to a worker.
    fn hand_over(&self, record: Arc<ForkRecord>, handshaken: Handshaken) {
        let Handshaken {
            socket,
            peer,
            uffd,
            layout,
        } = handshaken;
        let regions = layout.regions().iter().map(|(_, region)| *region).collect();
        // Set only here, once for each fork.
        let _ = record.regions.set(regions);
        record.set_serving();
        let session = Session::new(layout.into_regions());
        self.workers.adopt(NewFork {
            record,
            uffd,
            peer,
            socket,
            session,
        });
    }

    /// Counts and reports a refused connection. Its fork waits on.
    fn refuse(&mut self, listener: usize, pid: Option<i32>, refusal: Refusal) {
        let Some(listener) = self.listener(listener) else {
            return;
        };
        let refusal = Arc::new(refusal);
        if let Some(record) = listener.one() {
            record.count_refusal(&refusal);
        }
        let id = listener.one().map(|record| record.id.clone());
        if let Some(unreported) = listener.report(Instant::now()) {
            self.registry.observe(ForkEvent::Refused {
                id,
                pid,
                refusal,
                unreported,
            });
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let deadlines = self.entries.iter().filter_map(|(_, entry)| deadline(entry));
        let next = deadlines.chain(self.paused).min()?;
        Timespec::try_from(next.saturating_duration_since(Instant::now())).ok()
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        if self.paused.is_some_and(|until| until <= now) {
            self.pause(None);
        }
        for slot in self.slots(|entry| deadline(entry).is_some_and(|deadline| deadline <= now)) {
            match self.kind(slot) {
                Some(Kind::Handshaking) => {
                    let deadline = self.deadlines.handshake;
                    self.conclude(slot, Err(Refusal::Deadline { deadline }));
                }
                Some(Kind::Listener) => self.end_waiting(slot),
                None => {}
            }
        }
    }

    /// Ends the waiting of a fork whose VMM has not connected in time. If one has sent its userfaultfd, its handshake
    /// may still complete in time, which ends the waiting in any case.
    fn end_waiting(&mut self, slot: usize) {
        let vmms = self.entries.iter().filter_map(|(_, entry)| match entry {
            Entry::Handshaking { handshaking, listener } if *listener == slot && handshaking.has_sent_fd() => {
                Some(handshaking.deadline)
            }
            _ => None,
        });
        if let Some(deadline) = vmms.min() {
            if let Some(listener) = self.listener(slot) {
                listener.postpone_deadline(deadline);
            }
            return;
        }
        if let Some(record) = self.remove_listener(slot) {
            let reason = Arc::new(record.not_connected(self.deadlines.connect));
            self.registry.end(&record, ForkState::Failed, Some(reason));
        }
    }
}

fn is_listener_of(entry: &Entry, record: &Arc<ForkRecord>) -> bool {
    match entry {
        Entry::Listener(listener) => listener.one().is_some_and(|own| Arc::ptr_eq(own, record)),
        Entry::Handshaking { .. } => false,
    }
}

fn deadline(entry: &Entry) -> Option<Instant> {
    match entry {
        Entry::Listener(listener) => listener.deadline(),
        Entry::Handshaking { handshaking, .. } => Some(handshaking.deadline),
    }
}
