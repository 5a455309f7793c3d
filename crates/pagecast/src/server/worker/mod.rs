//! A thread that answers the faults of its forks.

mod busy_workers;
mod context;
mod filler;
mod filling;
mod handle;
mod idle_timer;
mod message;
mod needs_turn;
mod options;
mod polling;
mod served_fork;
mod token;
mod transparent_hugepages;

use std::cell::OnceCell;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pagecast_uffd::Errno;
use rustix::event::epoll::{self, EventFlags};
use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;
use slab::Slab;

use super::disposal::Disposal;
use super::fill::FillPool;
use super::fork::{FailReason, ForkEvent, ForkState, Refusal};
use super::registry::{Holder, Registry, Requested};
use crate::priority::WorkerPriority;
pub(super) use busy_workers::BusyWorkers;
use context::WorkerContext;
use filler::Filler;
pub(super) use handle::WorkerHandle;
use idle_timer::IdleTimer;
pub(super) use message::NewFork;
use message::{Message, Slot};
use needs_turn::NeedsTurn;
pub(super) use options::WorkerOptions;
use polling::Polling;
use served_fork::{End, Scratch, ServedFork};
use token::Token;

/// The most epoll events that are taken at once.
const EPOLL_EVENTS: usize = 64;

/// How often to check a killed VMM whose end cannot be watched.
const UNWATCHED_PAUSE: Duration = Duration::from_millis(10);

/// A fork, and whether its VMM has been killed.
struct Served {
    fork: ServedFork,
    /// Why the VMM was killed. The userfaultfd stays open until the VMM is dead: if it were closed earlier, the VMM
    /// could run on with zeros.
    killed: Option<Arc<FailReason>>,
    /// The kernel refused to report the end of the VMM, so it is checked repeatedly. The VMM is killed, so not for long.
    unwatched: bool,
}

impl Served {
    fn wants_to_fill(&self) -> bool {
        self.killed.is_none() && self.fork.wants_to_fill()
    }

    fn needs_turn(&self) -> bool {
        self.wants_to_fill() || self.next_turn().is_some()
    }

    /// The time at which it needs a turn without an event.
    fn next_turn(&self) -> Option<Instant> {
        if self.unwatched {
            return Some(Instant::now() + UNWATCHED_PAUSE);
        }
        self.killed.is_none().then(|| self.fork.next_turn()).flatten()
    }
}

pub(super) struct Worker {
    index: usize,
    context: Arc<WorkerContext>,
    disposal: Arc<Disposal>,
    count: Arc<AtomicUsize>,
    forks: Slab<Served>,
    scratch: Scratch,
    needs_turn: NeedsTurn,
    /// The thread that fills forks while others are served. Started on first use.
    filler: OnceCell<Option<Filler>>,
    /// The filler carries out a step.
    filler_is_busy: bool,
    polling: Polling,
    busy_workers: Arc<BusyWorkers>,
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
        busy_workers: Arc<BusyWorkers>,
        options: WorkerOptions,
    ) -> std::io::Result<(WorkerHandle, std::thread::JoinHandle<()>)> {
        let context = WorkerContext::new(
            registry,
            fill_pool,
            options.fault_deadline,
            options.fault_around,
            options.completion_rate,
        )?;
        let inbox = Arc::clone(&context.inbox);
        let forks = Arc::new(AtomicUsize::new(0));
        epoll::add(&context.epoll, &*inbox, Token::Inbox.encode(), EventFlags::IN)?;
        let idle_timer = IdleTimer::new()?;
        epoll::add(&context.epoll, &idle_timer, Token::IdleTimer.encode(), EventFlags::IN)?;
        let worker = Self {
            index,
            context: Arc::new(context),
            disposal,
            count: Arc::clone(&forks),
            forks: Slab::new(),
            scratch: Scratch::new(),
            needs_turn: NeedsTurn::default(),
            filler: OnceCell::new(),
            filler_is_busy: false,
            polling: Polling::new(options.busy_poll),
            busy_workers,
            idle_timer,
            may_be_raised: options.may_be_raised,
            stopping: false,
        };
        let thread = std::thread::Builder::new()
            .name(format!("pagecast-{index}"))
            .spawn(move || worker.run())?;
        Ok((WorkerHandle::new(inbox, forks), thread))
    }

    fn run(mut self) {
        let mut priority = WorkerPriority::new(self.may_be_raised);
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); EPOLL_EVENTS];
        while !(self.stopping && self.forks.is_empty()) {
            let is_busy = self.polling.is_due();
            let timeout = if is_busy {
                Some(Timespec::default())
            } else {
                self.timeout()
            };
            if let Some(pause) = timeout.as_ref().filter(|_| !is_busy) {
                // `epoll_wait` rounds up to milliseconds, and a retry may be due in 50 us. (`epoll_pwait2` needs Linux
                // 5.11, which is newer than Firecracker needs.)
                let mut ready = [PollFd::new(&self.context.epoll, PollFlags::IN)];
                // Whatever this returns, ready events are taken below.
                let _ = rustix::event::poll(&mut ready, Some(pause));
            }
            let timeout = timeout.map(|_| Timespec::default());
            let events = match epoll::wait(&self.context.epoll, &mut buffer, timeout.as_ref()) {
                Ok((events, _)) => &*events,
                // Only EINTR is possible for our own epoll.
                Err(_) => continue,
            };
            let (mut has_messages, mut answered) = (false, false);
            if !events.is_empty() {
                self.polling.found();
            }
            let alone = events.len() == 1;
            // A poll without an event is no wake.
            if !(is_busy && events.is_empty()) {
                priority.woken_for(events.len());
            }
            for event in events {
                // Copied out, because the kernel's struct is packed.
                let (flags, data) = (event.flags, event.data);
                match Token::decode(data) {
                    // Handled last, because a new fork may take the slot of one that ends in this very round.
                    Token::Inbox => has_messages = true,
                    Token::IdleTimer => self.end_idle_period(),
                    // A userfaultfd reports an error only if it was made blocking, and reports nothing else from then
                    // on.
                    Token::Uffd(slot) if flags.contains(EventFlags::ERR) => self.kill(slot, FailReason::Blocking),
                    Token::Uffd(slot) => {
                        self.step(slot, |fork, scratch| fork.serve(alone, scratch));
                        self.idle_timer.note_fault();
                        answered = true;
                    }
                    Token::Process(slot) => self.check_process(slot),
                    Token::Socket(slot) => self.drop_socket(slot),
                }
            }
            if has_messages {
                self.read_messages();
            }
            self.give_turns();
            if answered {
                let now = self.scratch.read_clock_at;
                self.busy_workers.note_fault(self.index, now);
                if alone && self.busy_workers.are_few(now) {
                    self.polling.after_fault();
                }
            }
        }
    }

    /// Releases memory that was mapped for faults, if none has come for a while.
    fn end_idle_period(&mut self) {
        if self.idle_timer.end_period() {
            for (_, served) in &self.forks {
                served.fork.record.template.release_mapped();
            }
        }
    }

    /// The longest time to sleep; `None` for no limit.
    fn timeout(&self) -> Option<Timespec> {
        let waiting = || self.needs_turn.slots().filter_map(|slot| self.forks.get(slot));
        if !self.filler_is_busy && waiting().any(Served::wants_to_fill) {
            return Some(Timespec::default());
        }
        let next = waiting().filter_map(Served::next_turn).min()?;
        let left = next.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    /// Notes a fork if it needs a turn without an event.
    fn note_needs_turn(&mut self, slot: usize) {
        if !self.needs_turn.contains(slot) && self.forks.get(slot).is_some_and(Served::needs_turn) {
            self.needs_turn.insert(slot);
        }
    }

    /// Gives a turn to the forks that need one.
    fn give_turns(&mut self) {
        if self.needs_turn.is_empty() {
            return;
        }
        let now = Instant::now();
        for slot in self.needs_turn.slots().collect::<Vec<_>>() {
            self.step(slot, |fork, scratch| fork.on_timer(now, scratch));
            if self.forks.get(slot).is_some_and(|served| served.unwatched) {
                self.check_process(slot);
            }
        }
        self.fill_one();
        let forks = &self.forks;
        self.needs_turn
            .retain(|slot| forks.get(slot).is_some_and(Served::needs_turn));
    }

    /// Runs `act` on a fork, and ends the fork if `act` says so.
    fn step(&mut self, slot: usize, act: impl FnOnce(&mut ServedFork, &mut Scratch) -> Result<(), End>) {
        let Some(served) = self.forks.get_mut(slot).filter(|served| served.killed.is_none()) else {
            return;
        };
        match act(&mut served.fork, &mut self.scratch) {
            Ok(()) => self.note_needs_turn(slot),
            Err(End::PeerGone) => self.finish(slot, ForkState::Exited, None),
            Err(End::Complete) => self.finish(slot, ForkState::Complete, None),
            Err(End::Failed(reason)) => self.kill(slot, reason),
        }
    }

    /// Kills a VMM: its faults cannot be answered, and it must not run on without them.
    fn kill(&mut self, slot: usize, reason: impl Into<Arc<FailReason>>) {
        let Some(served) = self.forks.get_mut(slot) else { return };
        // The handshake checked the permission to kill; an error for a dead process does not matter.
        let _ = served.fork.peer.pidfd.kill();
        // Its further events are of no use, and would wake us again and again.
        let _ = epoll::delete(&self.context.epoll, &served.fork.uffd);
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

    /// Handles the end of the socket. Firecracker before 1.12 closes it at once, so only the end of the process ends
    /// the fork.
    fn drop_socket(&mut self, slot: usize) {
        if let Some(socket) = self.forks.get_mut(slot).and_then(|served| served.fork.socket.take()) {
            let _ = epoll::delete(&self.context.epoll, &socket);
            // Closing it also closes unread data of the VMM.
            self.disposal.drop_later(socket);
        }
    }

    /// Ends a fork: first drops everything it holds, then reports the end.
    fn finish(&mut self, slot: usize, state: ForkState, reason: Option<Arc<FailReason>>) {
        let Some(Served { mut fork, .. }) = self.forks.try_remove(slot) else {
            return;
        };
        // A userfaultfd stays in the epoll set for as long as the VMM has its copy, so closing ours is not enough.
        let _ = epoll::delete(&self.context.epoll, &fork.uffd);
        let record = Arc::clone(&fork.record);
        fork.end_first_faults();
        if let Some(socket) = fork.socket.take() {
            let _ = epoll::delete(&self.context.epoll, &socket);
            self.disposal.drop_later(socket);
        }
        drop(fork);
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.context.registry.end(&record, state, reason);
    }

    fn read_messages(&mut self) {
        for message in self.context.inbox.take() {
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

    /// Returns `true` if the fork of this slot is still here.
    fn has(&self, slot: Slot) -> bool {
        self.forks
            .get(slot.index)
            .is_some_and(|served| served.fork.slot == slot)
    }

    /// Finds out, on a new thread, how the kernel would fill zeros of a fork. If no thread can be started, the server
    /// installs them.
    fn ask_how_kernel_fills(&self, slot: usize) {
        let Some(Served { fork, .. }) = self.forks.get(slot) else {
            return;
        };
        let (slot, pid, memory) = (fork.slot, fork.peer.pid, fork.small_memory());
        if memory.is_empty() {
            return;
        }
        let inbox = Arc::clone(&self.context.inbox);
        let _ = std::thread::Builder::new()
            .name("pagecast-thp".to_owned())
            .spawn(move || {
                if !transparent_hugepages::may_be_made(pid, &memory) {
                    inbox.send(Message::KernelFillsSmall(slot));
                }
            });
    }

    /// Carries out the current request for a fork.
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

    fn adopt(&mut self, fork: NewFork) {
        let slot = self.forks.vacant_key();
        self.forks.insert(Served {
            fork: ServedFork::new(fork, slot, Arc::clone(&self.context)),
            killed: None,
            unwatched: false,
        });
        let Some(Served { fork, .. }) = self.forks.get(slot) else {
            return;
        };
        // Checked here and not by the acceptor: it takes a lock of the VMM's memory, like all that a worker does.
        let refused = match fork.write_protected() {
            Ok(None) => None,
            Ok(Some(address)) => Some(FailReason::Refused(Refusal::WriteProtected { address: address.get() })),
            Err(errno) => Some(FailReason::Kernel {
                operation: "look at the memory of a VMM",
                errno,
            }),
        };
        if refused.is_some() {
            // The VMM got no page, and lives on like any VMM that is refused.
            return self.finish(slot, ForkState::Failed, refused.map(Arc::new));
        }
        // Edge-triggered: every wake reads all events, and the kernel need not check again.
        let on_new_events = EventFlags::IN | EventFlags::ET;
        let epoll = &self.context.epoll;
        let uffd = epoll::add(epoll, &fork.uffd, Token::Uffd(slot).encode(), on_new_events);
        let process = Token::Process(slot).encode();
        let pidfd = epoll::add(epoll, &fork.peer.pidfd, process, EventFlags::IN);
        let mut watched = uffd.and(pidfd);
        if let Some(socket) = &fork.socket {
            // Only its end is of interest, not its data.
            watched = watched.and_then(|()| epoll::add(epoll, socket, Token::Socket(slot).encode(), EventFlags::RDHUP));
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
            self.note_needs_turn(slot);
            return;
        }
        let (record, address) = (Arc::clone(&fork.record), fork.slot);
        self.context.registry.observe(ForkEvent::Serving {
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
        let inbox = Arc::clone(&self.context.inbox);
        record.set_holder(Holder::new(move |_| inbox.send(Message::Requested(address))));
        // Requests from before the fork came here.
        self.do_requested(slot);
    }
}
