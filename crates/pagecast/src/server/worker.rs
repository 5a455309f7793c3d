//! A thread that answers the faults of its forks.

use std::cell::OnceCell;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pagecast_uffd::Errno;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;
use slab::Slab;

use super::disposal::Disposal;
use super::failure::{FailReason, Refusal};
use super::fill_pool::FillPool;
use super::filler::{Filler, Job};
use super::fork_event::ForkEvent;
use super::fork_status::ForkState;
use super::idle_timer::IdleTimer;
use super::inbox::Inbox;
use super::record::Requested;
use super::registry::Registry;
use super::served_fork::{End, Filled, ReadToken, Scratch, ServedFork};
use super::transparent;
use super::workers::WorkerOptions;
use crate::priority::WorkerPriority;
use crate::template::ReadResult;

/// How many epoll events are taken at once.
const EPOLL_EVENTS: usize = 64;

/// How often to look after a killed VMM whose end cannot be watched.
const UNWATCHED_PAUSE: Duration = Duration::from_millis(10);

/// The place of a fork in its worker. Another fork may get the index later, but never the serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) index: usize,
    pub(super) serial: u64,
}

/// What others ask of a worker.
pub(super) enum Message {
    /// Serve this fork from now on.
    Adopt(Box<ServedFork>),
    /// The template's bytes, read elsewhere.
    Bytes { token: ReadToken, bytes: ReadResult },
    /// The kernel fills zeros of this fork in pages of 4 KiB.
    KernelFillsSmall(Slot),
    /// A step of filling this fork, carried out elsewhere, is over.
    Filled { slot: Slot, filled: Filled },
    /// Something else is requested of this fork.
    Requested(Slot),
    /// Stop as soon as there is no fork left.
    Stop,
}

/// A worker, seen from outside.
pub(super) struct WorkerHandle {
    pub(super) inbox: Arc<Inbox<Message>>,
    /// How many forks it has.
    pub(super) forks: Arc<AtomicUsize>,
}

impl Drop for WorkerHandle {
    /// Nobody can give it forks any more.
    fn drop(&mut self) {
        self.inbox.send(Message::Stop);
    }
}

/// Which file descriptor of which fork an epoll event is about.
#[derive(Clone, Copy)]
enum Token {
    Inbox,
    IdleTimer,
    Uffd(usize),
    Process(usize),
    Socket(usize),
}

impl Token {
    fn encode(self) -> EventData {
        EventData::new_u64(match self {
            Self::Inbox => 0,
            Self::IdleTimer => 4,
            Self::Uffd(slot) => (slot as u64) << 2 | 1,
            Self::Process(slot) => (slot as u64) << 2 | 2,
            Self::Socket(slot) => (slot as u64) << 2 | 3,
        })
    }

    fn decode(data: EventData) -> Self {
        let data = data.u64();
        let slot = usize::try_from(data >> 2).unwrap_or(usize::MAX);
        match data & 3 {
            1 => Self::Uffd(slot),
            2 => Self::Process(slot),
            3 => Self::Socket(slot),
            _ if slot == 1 => Self::IdleTimer,
            _ => Self::Inbox,
        }
    }
}

/// A fork and whether its VMM has been killed.
struct Served {
    fork: ServedFork,
    /// Why its VMM was killed. Its userfaultfd stays open until the VMM is dead: closed earlier, it could run on with zeros.
    killed: Option<Arc<FailReason>>,
    /// The kernel would not tell us of its end, so it has to be looked at again and again. It is killed, so not for long.
    unwatched: bool,
    /// It is in [`Worker::restless`].
    restless: bool,
}

impl Served {
    fn wants_to_fill(&self) -> bool {
        self.killed.is_none() && self.fork.wants_to_fill()
    }

    fn is_restless(&self, fault_deadline: Duration) -> bool {
        self.wants_to_fill() || self.next_turn(fault_deadline).is_some()
    }

    /// When it wants a turn though nothing happens.
    fn next_turn(&self, fault_deadline: Duration) -> Option<Instant> {
        if self.unwatched {
            return Some(Instant::now() + UNWATCHED_PAUSE);
        }
        self.killed
            .is_none()
            .then(|| self.fork.next_turn(fault_deadline))
            .flatten()
    }
}

pub(super) struct Worker {
    index: usize,
    epoll: Arc<OwnedFd>,
    inbox: Arc<Inbox<Message>>,
    registry: Arc<Registry>,
    disposal: Arc<Disposal>,
    count: Arc<AtomicUsize>,
    forks: Slab<Served>,
    scratch: Scratch,
    /// Forks that want a turn though nothing happens: a retry, a read, a fill is outstanding. Mostly none, and then a fault
    /// costs the same however many forks there are.
    restless: Vec<usize>,
    /// Where the next round of fills begins, so that all get their turn.
    next_to_fill: usize,
    /// What fills forks while there are others to be served. Started when it is needed first.
    filler: OnceCell<Option<Filler>>,
    /// It carries out a step.
    filler_is_busy: bool,
    /// How long to look for faults without sleeping after there was one.
    busy_poll: Duration,
    busy_until: Option<Instant>,
    idle_timer: IdleTimer,
    may_be_raised: bool,
    stopping: bool,
}

impl Worker {
    /// Starts a worker thread.
    pub(super) fn start(
        index: usize,
        registry: Arc<Registry>,
        fill_pool: Arc<FillPool>,
        disposal: Arc<Disposal>,
        options: WorkerOptions,
    ) -> std::io::Result<(WorkerHandle, std::thread::JoinHandle<()>)> {
        let inbox = Arc::new(Inbox::new()?);
        let forks = Arc::new(AtomicUsize::new(0));
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        epoll::add(&epoll, &*inbox, Token::Inbox.encode(), EventFlags::IN)?;
        let idle_timer = IdleTimer::new()?;
        epoll::add(&epoll, &idle_timer, Token::IdleTimer.encode(), EventFlags::IN)?;
        let deliver = {
            let inbox = Arc::clone(&inbox);
            Arc::new(move |token, bytes| inbox.send(Message::Bytes { token, bytes }))
        };
        let scratch = Scratch::new(
            deliver,
            fill_pool,
            Arc::clone(&epoll),
            options.fault_deadline,
            options.completion_rate,
        );
        let worker = Self {
            index,
            epoll,
            registry,
            disposal,
            count: Arc::clone(&forks),
            forks: Slab::new(),
            inbox: Arc::clone(&inbox),
            scratch,
            restless: Vec::new(),
            next_to_fill: 0,
            filler: OnceCell::new(),
            filler_is_busy: false,
            busy_poll: options.busy_poll,
            busy_until: None,
            idle_timer,
            may_be_raised: options.may_be_raised,
            stopping: false,
        };
        let thread = std::thread::Builder::new()
            .name(format!("pagecast-{index}"))
            .spawn(move || worker.run())?;
        Ok((WorkerHandle { inbox, forks }, thread))
    }

    fn run(mut self) {
        let mut priority = WorkerPriority::new(self.may_be_raised);
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); EPOLL_EVENTS];
        while !(self.stopping && self.forks.is_empty()) {
            let is_busy = self.is_busy();
            let timeout = if is_busy {
                Some(Timespec::default())
            } else {
                self.timeout()
            };
            if let Some(pause) = timeout.as_ref().filter(|_| !is_busy) {
                // `epoll_wait` rounds up to milliseconds, and a retry may be due in 50 us. (`epoll_pwait2` needs Linux 5.11,
                // which is more than Firecracker does.)
                let mut ready = [PollFd::new(&self.epoll, PollFlags::IN)];
                // Whatever comes of it, what is ready is looked at.
                let _ = rustix::event::poll(&mut ready, Some(pause));
            }
            let timeout = timeout.map(|_| Timespec::default());
            let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
                Ok((events, _)) => &*events,
                // Only EINTR is possible for an epoll of our own.
                Err(_) => continue,
            };
            let mut mail = false;
            let alone = events.len() == 1;
            // A look while it spins is no wake.
            if !(is_busy && events.is_empty()) {
                priority.woken_for(events.len());
            }
            for event in events {
                // Copied out, because the kernel's struct is packed.
                let (flags, data) = (event.flags, event.data);
                match Token::decode(data) {
                    // Last, because a fork that comes may take the place of one that goes in this very round.
                    Token::Inbox => mail = true,
                    Token::IdleTimer => self.end_idle_period(),
                    // A userfaultfd reports an error only when it has been made blocking, and nothing else from then on.
                    Token::Uffd(slot) if flags.contains(EventFlags::ERR) => self.kill(slot, FailReason::Blocking),
                    Token::Uffd(slot) => {
                        self.step(slot, |fork, scratch| fork.serve(alone, scratch));
                        self.idle_timer.note_fault();
                        if !self.busy_poll.is_zero() {
                            self.busy_until = Some(Instant::now() + self.busy_poll);
                        }
                    }
                    Token::Process(slot) => self.check_process(slot),
                    Token::Socket(slot) => self.drop_socket(slot),
                }
            }
            if mail {
                self.read_mail();
            }
            self.serve_restless();
        }
    }

    /// Lets go of what is mapped for faults if none has come for a while.
    fn end_idle_period(&mut self) {
        if self.idle_timer.end_period() {
            for (_, served) in &self.forks {
                served.fork.record.template.release_mapped();
            }
        }
    }

    /// Whether a fault may come any moment, and is not to be slept for.
    fn is_busy(&mut self) -> bool {
        self.busy_until = self.busy_until.filter(|until| Instant::now() < *until);
        self.busy_until.is_some()
    }

    /// How long to sleep at most; `None` for as long as nothing happens.
    fn timeout(&self) -> Option<Timespec> {
        let deadline = self.scratch.fault_deadline;
        let restless = || self.restless.iter().filter_map(|slot| self.forks.get(*slot));
        if !self.filler_is_busy && restless().any(Served::wants_to_fill) {
            return Some(Timespec::default());
        }
        let next = restless().filter_map(|served| served.next_turn(deadline)).min()?;
        let left = next.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    /// Notes that a fork may want a turn though nothing happens.
    fn note_restless(&mut self, slot: usize) {
        let deadline = self.scratch.fault_deadline;
        if let Some(served) = self.forks.get_mut(slot)
            && !served.restless
            && served.is_restless(deadline)
        {
            served.restless = true;
            self.restless.push(slot);
        }
    }

    /// Gives those that want it a turn.
    fn serve_restless(&mut self) {
        if self.restless.is_empty() {
            return;
        }
        let now = Instant::now();
        for slot in self.restless.clone() {
            self.step(slot, |fork, scratch| fork.on_timer(now, scratch));
            if self.forks.get(slot).is_some_and(|served| served.unwatched) {
                self.check_process(slot);
            }
        }
        self.fill_one();
        let deadline = self.scratch.fault_deadline;
        let forks = &mut self.forks;
        self.restless.retain(|slot| {
            forks.get_mut(*slot).is_some_and(|served| {
                served.restless = served.is_restless(deadline);
                served.restless
            })
        });
    }

    /// Lets a fork do something, and ends it where that is what came of it.
    fn step(&mut self, slot: usize, act: impl FnOnce(&mut ServedFork, &mut Scratch) -> Result<(), End>) {
        let Some(served) = self.forks.get_mut(slot).filter(|served| served.killed.is_none()) else {
            return;
        };
        let result = act(&mut served.fork, &mut self.scratch);
        if let Some(reason) = served.fork.take_given_up() {
            self.registry.observe(ForkEvent::NotCompleted {
                id: served.fork.record.id.clone(),
                reason,
            });
        }
        if let Some(watched) = served.fork.take_watched() {
            self.registry.report(&served.fork.record, watched);
        }
        match result {
            Ok(()) => self.note_restless(slot),
            Err(End::PeerGone) => self.finish(slot, ForkState::Exited, None),
            Err(End::Complete) => self.finish(slot, ForkState::Complete, None),
            Err(End::Failed(reason)) => self.kill(slot, reason),
        }
    }

    /// Kills a VMM: its faults cannot be answered, and it must not go on without.
    fn kill(&mut self, slot: usize, reason: impl Into<Arc<FailReason>>) {
        let Some(served) = self.forks.get_mut(slot) else { return };
        // Not being allowed to was ruled out in the handshake; already dead is fine.
        let _ = served.fork.peer.pidfd.kill();
        // What it still reports is of no use, and would wake us again and again.
        let _ = epoll::delete(&self.epoll, &served.fork.uffd);
        served.killed = Some(reason.into());
    }

    fn check_process(&mut self, slot: usize) {
        let Some(served) = self.forks.get_mut(slot) else { return };
        if !served.fork.peer.pidfd.has_exited() {
            return;
        }
        match served.killed.take() {
            Some(reason) => self.finish(slot, ForkState::Failed, Some(reason)),
            None => self.finish(slot, ForkState::Exited, None),
        }
    }

    /// The VMM has closed its end. Firecracker before 1.12 does so at once, so this alone is no end; the process is.
    fn drop_socket(&mut self, slot: usize) {
        if let Some(socket) = self.forks.get_mut(slot).and_then(|served| served.fork.socket.take()) {
            let _ = epoll::delete(&self.epoll, &socket);
            // What the VMM has sent and nobody has read is closed with it.
            self.disposal.drop_later(socket);
        }
    }

    /// Lets go of a fork, first of everything it holds, then says so.
    fn finish(&mut self, slot: usize, state: ForkState, reason: Option<Arc<FailReason>>) {
        let Some(Served { mut fork, .. }) = self.forks.try_remove(slot) else {
            return;
        };
        // A userfaultfd stays in the epoll set for as long as the VMM has its copy, so closing ours is not enough.
        let _ = epoll::delete(&self.epoll, &fork.uffd);
        let record = Arc::clone(&fork.record);
        if let Some(watched) = fork.end_watch() {
            self.registry.report(&record, watched);
        }
        if let Some(socket) = fork.socket.take() {
            let _ = epoll::delete(&self.epoll, &socket);
            self.disposal.drop_later(socket);
        }
        drop(fork);
        record.template.release_mapped();
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.registry.end(&record, state, reason);
    }

    fn read_mail(&mut self) {
        let inbox = Arc::clone(&self.inbox);
        for message in inbox.take() {
            match message {
                Message::Adopt(fork) => self.adopt(*fork),
                Message::Bytes { token, bytes } => {
                    if self.has(token.slot) {
                        self.step(token.slot.index, |fork, scratch| fork.on_bytes(token, bytes, scratch));
                    }
                }
                Message::Filled { slot, filled } => {
                    self.filler_is_busy = false;
                    if self.has(slot) {
                        self.step(slot.index, |fork, scratch| fork.on_filled(filled, scratch));
                    }
                }
                Message::KernelFillsSmall(slot) => {
                    if self.has(slot) {
                        self.step(slot.index, |fork, _| {
                            fork.kernel_fills_small();
                            Ok(())
                        });
                    }
                }
                Message::Requested(slot) => {
                    if self.has(slot) {
                        self.do_requested(slot.index);
                    }
                }
                Message::Stop => self.stopping = true,
            }
        }
    }

    /// Whether the fork of this slot is still here.
    fn has(&self, slot: Slot) -> bool {
        self.forks
            .get(slot.index)
            .is_some_and(|served| served.fork.slot() == slot)
    }

    /// Has the kernel asked how it would fill zeros of a fork. Where there is no thread for that, they are installed by us.
    fn ask_how_kernel_fills(&self, slot: usize) {
        let Some(Served { fork, .. }) = self.forks.get(slot) else {
            return;
        };
        let (slot, pid, memory) = (fork.slot(), fork.peer.pid, fork.small_memory());
        if memory.is_empty() {
            return;
        }
        let inbox = Arc::clone(&self.inbox);
        let _ = std::thread::Builder::new()
            .name("pagecast-thp".to_owned())
            .spawn(move || {
                if !transparent::may_be_made(pid, &memory) {
                    inbox.send(Message::KernelFillsSmall(slot));
                }
            });
    }

    /// Does with a fork what is requested now.
    fn do_requested(&mut self, slot: usize) {
        let Some(served) = self.forks.get(slot).filter(|served| served.killed.is_none()) else {
            return;
        };
        match served.fork.record.requested() {
            Requested::Serve => self.step(slot, |fork, _| {
                fork.abandon_completion();
                Ok(())
            }),
            Requested::Complete { at_once } => self.step(slot, |fork, _| {
                fork.begin_completion(at_once);
                Ok(())
            }),
            Requested::Kill(reason) => self.kill(slot, reason),
        }
    }

    fn adopt(&mut self, mut fork: ServedFork) {
        fork.index = self.forks.vacant_key();
        let slot = self.forks.insert(Served {
            fork,
            killed: None,
            unwatched: false,
            restless: false,
        });
        let Some(Served { fork, .. }) = self.forks.get(slot) else {
            return;
        };
        let address = fork.slot();
        // Asked here and not by the acceptor, because it takes a lock of the VMM's memory, as all that a worker does.
        let refused = match fork.write_protected() {
            Ok(None) => None,
            Ok(Some(address)) => Some(FailReason::Refused(Refusal::WriteProtected { address: address.get() })),
            Err(errno) => Some(FailReason::Kernel {
                operation: "look at the memory of a VMM",
                errno,
            }),
        };
        if refused.is_some() {
            // It got no page, and lives on as any VMM that is refused.
            return self.finish(slot, ForkState::Failed, refused.map(Arc::new));
        }
        // Told of each new event once: all are read whenever there is one, and the kernel need not look again.
        let on_new_events = EventFlags::IN | EventFlags::ET;
        let uffd = epoll::add(&self.epoll, &fork.uffd, Token::Uffd(slot).encode(), on_new_events);
        let pidfd = epoll::add(
            &self.epoll,
            &fork.peer.pidfd,
            Token::Process(slot).encode(),
            EventFlags::IN,
        );
        let mut watched = uffd.and(pidfd);
        if let Some(socket) = &fork.socket {
            // Nothing it says is of interest, only that it ends.
            watched =
                watched.and_then(|()| epoll::add(&self.epoll, socket, Token::Socket(slot).encode(), EventFlags::RDHUP));
        }
        if let Err(errno) = watched {
            let reason = FailReason::Kernel {
                operation: "watch a fork",
                errno: Errno::from(errno),
            };
            self.kill(slot, reason);
            if let Some(served) = self.forks.get_mut(slot) {
                served.unwatched = true;
            }
            self.note_restless(slot);
            return;
        }
        let record = Arc::clone(&fork.record);
        self.registry.observe(ForkEvent::Serving {
            id: record.id.clone(),
            pid: fork.peer.pid,
            memory_bytes: record.memory_bytes(),
            regions: record.regions.get().map_or(0, |regions| regions.len()),
        });
        self.step(slot, |fork, _| {
            fork.begin();
            Ok(())
        });
        self.ask_how_kernel_fills(slot);
        record.set_worker(Arc::clone(&self.inbox), address);
        // What was requested before it came here.
        self.do_requested(slot);
    }

    /// One bounded step of one completion: faults come first, and the next look at them is never far.
    fn fill_one(&mut self) {
        if self.filler_is_busy {
            return;
        }
        let filling = || {
            let wants = |slot: &usize| self.forks.get(*slot).is_some_and(Served::wants_to_fill);
            self.restless.iter().copied().filter(wants)
        };
        let next = filling().filter(|slot| *slot >= self.next_to_fill).min();
        let Some(slot) = next.or_else(|| filling().min()) else {
            return;
        };
        self.next_to_fill = slot + 1;
        // Where there is no other fork, nobody is held up by what this one takes.
        if self.forks.len() > 1 && self.filler().is_some() {
            self.fill_elsewhere(slot);
        } else {
            self.step(slot, ServedFork::fill);
        }
    }

    fn filler(&self) -> Option<&Filler> {
        let start = || {
            let scratch = &self.scratch;
            Filler::start(
                self.index,
                Arc::clone(&self.inbox),
                Arc::clone(&scratch.fill_pool),
                Arc::clone(&scratch.zeros),
            )
        };
        self.filler.get_or_init(start).as_ref()
    }

    /// Has the filler carry out the next step of a fork.
    fn fill_elsewhere(&mut self, slot: usize) {
        let Some(address) = self.forks.get(slot).map(|served| served.fork.slot()) else {
            return;
        };
        let mut begun = None;
        self.step(slot, |fork, scratch| {
            begun = fork.begin_fill_elsewhere(scratch)?;
            Ok(())
        });
        let (Some((step, interrupt)), Some(filler)) = (begun, self.filler()) else {
            return;
        };
        let job = Job {
            slot: address,
            step,
            interrupt,
        };
        match filler.fill(job) {
            Ok(()) => self.filler_is_busy = true,
            // It has panicked, which was told.
            Err(Job { step, .. }) => {
                let fill_pool = Arc::clone(&self.scratch.fill_pool);
                let result = step.carry_out(&fill_pool.take_free(), &self.scratch.zeros, || false);
                self.step(slot, |fork, scratch| fork.on_filled(result, scratch));
            }
        }
    }
}
