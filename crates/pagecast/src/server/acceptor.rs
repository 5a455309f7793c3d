//! The thread that VMMs meet first: it listens, accepts and shakes hands, so that no worker has to.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use slab::Slab;

use super::failure::{FailReason, Refusal};
use super::fork::{Deadlines, ForkId, ForkState, Plan};
use super::handshaking::{Handshaken, Handshaking};
use super::hugepages;
use super::inbox::Inbox;
use super::record::ForkRecord;
use super::registry::Registry;
use super::served_fork::ServedFork;
use super::socket_file::SocketFile;
use super::workers::Workers;
use crate::session::Session;
use crate::template::Template;

const EPOLL_EVENTS: usize = 64;
const INBOX: u64 = u64::MAX;

/// How many VMMs that came through one door may shake hands at once; others wait in the socket's queue, and at no other
/// door does anybody notice.
const MOST_HANDSHAKES: usize = 128;

/// How long to accept nobody when there is no file descriptor left for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What others ask of the acceptor.
pub(super) enum Request {
    Open(Door),
    /// Take no VMM for this fork any more.
    Close(Arc<ForkRecord>),
    /// Take no VMM any more, and stop.
    Stop,
}

/// A socket that VMMs connect to.
pub(super) struct Door {
    pub(super) socket: SocketFile,
    /// Who may.
    pub(super) user: u32,
    pub(super) guests: Guests,
}

/// For whom a door is.
pub(super) enum Guests {
    /// For the VMM of one fork, in time.
    One { record: Arc<ForkRecord>, deadline: Instant },
    /// For any number of VMMs, each a fork named with the prefix and a number.
    Any {
        template: Template,
        plan: Plan,
        prefix: String,
        next: u64,
        /// How many are shaking hands.
        handshakes: usize,
    },
}

enum Entry {
    Door(Door),
    Handshaking {
        handshaking: Box<Handshaking>,
        /// Through which door it came, where that is still open.
        door: Option<usize>,
    },
}

/// What of an [`Entry`] has to be known while it is not borrowed.
enum Kind {
    Door,
    Handshaking,
}

pub(super) struct Acceptor {
    epoll: OwnedFd,
    inbox: Arc<Inbox<Request>>,
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    deadlines: Deadlines,
    entries: Slab<Entry>,
    /// Doors are not listened at until then.
    paused: Option<Instant>,
    next_serial: u64,
    stopping: bool,
}

impl Acceptor {
    /// Starts the acceptor thread.
    pub(super) fn start(
        registry: Arc<Registry>,
        workers: Arc<Workers>,
        deadlines: Deadlines,
    ) -> std::io::Result<(Arc<Inbox<Request>>, std::thread::JoinHandle<()>)> {
        let inbox = Arc::new(Inbox::new()?);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*inbox, EventData::new_u64(INBOX), EventFlags::IN)?;
        let acceptor = Self {
            epoll,
            inbox: Arc::clone(&inbox),
            registry,
            workers,
            deadlines,
            entries: Slab::new(),
            paused: None,
            next_serial: 0,
            stopping: false,
        };
        let thread = std::thread::Builder::new()
            .name("pagecast-accept".to_owned())
            .spawn(move || acceptor.run())?;
        Ok((inbox, thread))
    }

    fn run(mut self) {
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); EPOLL_EVENTS];
        while !self.stopping {
            let timeout = self.timeout();
            let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
                Ok((events, _)) => &*events,
                // Only EINTR is possible for an epoll of our own.
                Err(_) => continue,
            };
            let mut mail = false;
            for event in events {
                match event.data.u64() {
                    INBOX => mail = true,
                    slot => {
                        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
                        match self.kind(slot) {
                            Some(Kind::Door) => self.accept(slot),
                            Some(Kind::Handshaking) => self.receive(slot),
                            None => {}
                        }
                    }
                }
            }
            if mail {
                self.read_mail();
            }
            self.run_timers();
        }
        self.close_all();
    }

    fn kind(&self, slot: usize) -> Option<Kind> {
        self.entries.get(slot).map(|entry| match entry {
            Entry::Door(_) => Kind::Door,
            Entry::Handshaking { .. } => Kind::Handshaking,
        })
    }

    fn read_mail(&mut self) {
        let inbox = Arc::clone(&self.inbox);
        for request in inbox.take() {
            match request {
                Request::Open(door) => self.open(door),
                Request::Close(record) => self.close(&record),
                Request::Stop => self.stopping = true,
            }
        }
    }

    fn open(&mut self, door: Door) {
        if let Guests::One { record, .. } = &door.guests
            && record.state().is_end()
        {
            // Forgotten before it came here.
            return;
        }
        let flags = self.door_flags(&door);
        let entry = self.entries.vacant_entry();
        let data = EventData::new_u64(entry.key() as u64);
        match epoll::add(&self.epoll, &door.socket, data, flags) {
            Ok(()) => {
                entry.insert(Entry::Door(door));
            }
            Err(errno) => {
                if let Guests::One { record, .. } = door.guests {
                    let reason = FailReason::Kernel {
                        operation: "watch a socket",
                        errno: errno.into(),
                    };
                    self.registry.end(&record, ForkState::Failed, Some(reason));
                }
            }
        }
    }

    fn close(&mut self, record: &Arc<ForkRecord>) {
        let of_fork = |entry: &Entry| match entry {
            Entry::Door(Door {
                guests: Guests::One { record: own, .. },
                ..
            }) => Arc::ptr_eq(own, record),
            Entry::Door(_) => false,
            Entry::Handshaking { handshaking, .. } => Arc::ptr_eq(&handshaking.record, record),
        };
        let slots: Vec<usize> = self.slots(of_fork);
        for slot in slots {
            self.remove(slot);
        }
        // Else its VMM has shaken hands meanwhile and is served: nobody but this thread ends the waiting.
        if record.state() == ForkState::Waiting {
            let reason = match record.take_doom() {
                // There is nobody to kill.
                None | Some(FailReason::Killed) => FailReason::Closed,
                Some(reason) => reason,
            };
            self.registry.end(record, ForkState::Failed, Some(reason));
        }
    }

    fn close_all(&mut self) {
        for slot in self.slots(|_| true) {
            match self.remove(slot) {
                Some(Entry::Door(door)) => {
                    let Door { socket, guests, .. } = door;
                    drop(socket);
                    if let Guests::One { record, .. } = guests {
                        self.registry.end(&record, ForkState::Failed, Some(FailReason::Closed));
                    }
                }
                Some(Entry::Handshaking { handshaking, .. }) => {
                    let record = Arc::clone(&handshaking.record);
                    drop(handshaking);
                    self.refuse(&record, Refusal::Closing);
                }
                None => {}
            }
        }
    }

    fn slots(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<usize> {
        let entries = self.entries.iter().filter(|(_, entry)| wanted(entry));
        entries.map(|(slot, _)| slot).collect()
    }

    fn remove(&mut self, slot: usize) -> Option<Entry> {
        let entry = self.entries.try_remove(slot)?;
        // Closing would do where nobody else has a copy, and nobody has; being sure costs nothing.
        match &entry {
            Entry::Door(door) => {
                let _ = epoll::delete(&self.epoll, &door.socket);
            }
            Entry::Handshaking { handshaking, door } => {
                let _ = epoll::delete(&self.epoll, &**handshaking);
                self.count_handshake(*door, |count| count.saturating_sub(1));
            }
        }
        Some(entry)
    }

    /// Whether anybody is let in at a door now.
    fn is_open(&self, door: &Door) -> bool {
        let has_room = match door.guests {
            Guests::One { .. } => true,
            Guests::Any { handshakes, .. } => handshakes < MOST_HANDSHAKES,
        };
        has_room && self.paused.is_none()
    }

    fn door_flags(&self, door: &Door) -> EventFlags {
        if self.is_open(door) {
            EventFlags::IN
        } else {
            EventFlags::empty()
        }
    }

    /// Listens at a door if anybody is let in there.
    fn watch_door(&self, slot: usize) {
        if let Some(Entry::Door(door)) = self.entries.get(slot) {
            let data = EventData::new_u64(slot as u64);
            let _ = epoll::modify(&self.epoll, &door.socket, data, self.door_flags(door));
        }
    }

    fn pause(&mut self, until: Option<Instant>) {
        self.paused = until;
        for slot in self.slots(|entry| matches!(entry, Entry::Door(_))) {
            self.watch_door(slot);
        }
    }

    fn count_handshake(&mut self, door: Option<usize>, change: impl FnOnce(usize) -> usize) {
        let Some(slot) = door else { return };
        let Some(Entry::Door(Door {
            guests: Guests::Any { handshakes, .. },
            ..
        })) = self.entries.get_mut(slot)
        else {
            return;
        };
        let before = *handshakes;
        *handshakes = change(before);
        if (before < MOST_HANDSHAKES) != (*handshakes < MOST_HANDSHAKES) {
            self.watch_door(slot);
        }
    }

    fn accept(&mut self, slot: usize) {
        if self.paused.is_some() {
            return;
        }
        let Some(Entry::Door(door)) = self.entries.get_mut(slot) else {
            return;
        };
        let stream = match door.socket.accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            // Gone before we got to it, or no file descriptor left: it stays in the queue and would wake us at once.
            Err(_) => {
                self.pause(Some(Instant::now() + ACCEPT_PAUSE));
                return;
            }
        };
        let user = door.user;
        let (record, door) = match &mut door.guests {
            Guests::One { record, .. } => {
                let record = Arc::clone(record);
                // Accept once: the socket and its file go now.
                self.remove(slot);
                (record, None)
            }
            Guests::Any {
                template,
                plan,
                prefix,
                next,
                ..
            } => {
                let Some(record) = new_fork(&self.registry, template, *plan, prefix, next) else {
                    return;
                };
                (record, Some(slot))
            }
        };
        self.greet(stream, &record, user, door);
    }

    fn greet(&mut self, stream: UnixStream, record: &Arc<ForkRecord>, user: u32, door: Option<usize>) {
        let deadline = Instant::now() + self.deadlines.handshake;
        let handshaking = match Handshaking::new(stream, Arc::clone(record), user, deadline) {
            Ok(handshaking) => Box::new(handshaking),
            Err(refusal) => return self.refuse(record, refusal),
        };
        let entry = self.entries.vacant_entry();
        let slot = entry.key();
        match epoll::add(
            &self.epoll,
            &*handshaking,
            EventData::new_u64(slot as u64),
            EventFlags::IN,
        ) {
            Ok(()) => {
                entry.insert(Entry::Handshaking { handshaking, door });
                self.count_handshake(door, |count| count + 1);
                // Firecracker has sent its message by now, more often than not.
                self.receive(slot);
            }
            Err(errno) => {
                drop(handshaking);
                self.refuse(record, Refusal::Socket { errno: errno.into() });
            }
        }
    }

    fn receive(&mut self, slot: usize) {
        let Some(Entry::Handshaking { handshaking, .. }) = self.entries.get_mut(slot) else {
            return;
        };
        let record = Arc::clone(&handshaking.record);
        let received = handshaking.receive();
        if matches!(received, Ok(false)) {
            return;
        }
        let Some(Entry::Handshaking { handshaking, .. }) = self.remove(slot) else {
            return;
        };
        let concluded = match received {
            Ok(_) => handshaking.conclude(),
            Err(refusal) => {
                drop(handshaking);
                Err(refusal)
            }
        };
        match concluded.and_then(|handshaken| hugepages::admit(&self.registry, handshaken)) {
            Ok(handshaken) => self.hand_over(handshaken),
            Err(refusal) => self.refuse(&record, refusal),
        }
    }

    /// Gives a fork to a worker.
    fn hand_over(&mut self, handshaken: Handshaken) {
        let Handshaken {
            socket,
            record,
            peer,
            uffd,
            layout,
        } = handshaken;
        let regions = layout.regions().iter().map(|(_, region)| *region).collect();
        // Set here only, once a fork.
        let _ = record.regions.set(regions);
        record.set_serving();
        self.next_serial += 1;
        let session = Session::new(layout.into_regions());
        let fork = ServedFork::new(record, uffd, peer, socket, session, self.next_serial);
        self.workers.adopt(fork);
    }

    fn refuse(&self, record: &Arc<ForkRecord>, refusal: Refusal) {
        self.registry
            .end(record, ForkState::Failed, Some(FailReason::Refused(refusal)));
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
            let (record, reason) = match self.remove(slot) {
                Some(Entry::Handshaking { handshaking, .. }) => (
                    Arc::clone(&handshaking.record),
                    FailReason::Refused(Refusal::Deadline {
                        deadline: self.deadlines.handshake,
                    }),
                ),
                Some(Entry::Door(Door {
                    guests: Guests::One { record, .. },
                    ..
                })) => (
                    record,
                    FailReason::ConnectDeadline {
                        deadline: self.deadlines.connect,
                    },
                ),
                _ => continue,
            };
            self.registry.end(&record, ForkState::Failed, Some(reason));
        }
    }
}

fn deadline(entry: &Entry) -> Option<Instant> {
    match entry {
        Entry::Handshaking { handshaking, .. } => Some(handshaking.deadline),
        Entry::Door(Door {
            guests: Guests::One { deadline, .. },
            ..
        }) => Some(*deadline),
        Entry::Door(_) => None,
    }
}

/// A new fork with the next free name. `None` never: `Server::listen` saw that the prefix leaves room for any number.
fn new_fork(
    registry: &Registry,
    template: &Template,
    plan: Plan,
    prefix: &str,
    next: &mut u64,
) -> Option<Arc<ForkRecord>> {
    loop {
        *next += 1;
        let id: ForkId = format!("{prefix}-{next}").parse().ok()?;
        if let Ok(record) = registry.insert(id, template.clone(), plan, true) {
            return Some(record);
        }
    }
}
