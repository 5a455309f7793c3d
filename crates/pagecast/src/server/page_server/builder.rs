//! The configuration of a server.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use super::{Server, Threads};
use crate::priority;
use crate::server::acceptor::{self, Acceptor};
use crate::server::deadlines::Deadlines;
use crate::server::disposal::Disposal;
use crate::server::error::Error;
use crate::server::fill::FillPool;
use crate::server::fork::ForkEvent;
use crate::server::inbox::Inbox;
use crate::server::registry::{Observer, Registry};
use crate::server::worker::WorkerOptions;
use crate::server::workers::Workers;

/// The default of the most bytes a second that a completion installs.
const COMPLETION_RATE: u64 = 1 << 30;

/// The default of the longest time to check for the next fault without sleeping.
const BUSY_POLL: Duration = Duration::from_micros(100);

/// The default of the most pages that one fault installs.
const FAULT_AROUND: usize = 32;

/// The configuration of a server.
pub struct Builder {
    workers: Option<usize>,
    deadlines: Deadlines,
    completion_rate: Option<NonZeroU64>,
    fill_threads: Option<NonZeroUsize>,
    busy_poll: Duration,
    fault_around: usize,
    observer: Observer,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            workers: None,
            deadlines: Deadlines::default(),
            completion_rate: NonZeroU64::new(COMPLETION_RATE),
            fill_threads: None,
            busy_poll: BUSY_POLL,
            fault_around: FAULT_AROUND,
            observer: Box::new(|_| {}),
        }
    }

    /// The number of threads that answer faults; at least one. Forks are spread evenly over them.
    ///
    /// Default: two per processor, at most 16. The first forks get a thread each. Later forks share one thread per
    /// processor, or all threads if this process may not raise the priority of a thread (`CAP_SYS_NICE`).
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = Some(workers.max(1));
        self
    }

    /// Sets how long the server waits.
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// The most bytes a second that the completion of one fork installs while no caller waits for it. Default: 1 GiB,
    /// which leaves others a part of the memory bandwidth. `None` for no limit.
    ///
    /// [`close`](Server::close) and [`vacate`](Server::vacate) ignore this.
    #[must_use]
    pub fn completion_rate(mut self, bytes_per_second: Option<NonZeroU64>) -> Self {
        self.completion_rate = bytes_per_second;
        self
    }

    /// The most threads that fill (prefault, complete) one fork at a time, whatever else runs on this host. A fork is
    /// filled on all of them while no other fork is, and on one while others have the rest. Default: one, and one more
    /// for each idle processor, at most three more.
    #[must_use]
    pub fn fill_threads(mut self, threads: NonZeroUsize) -> Self {
        self.fill_threads = Some(threads);
        self
    }

    /// The longest time for which a worker checks for the next fault without sleeping, after it has answered one; zero to always
    /// sleep. Default: 100 us.
    ///
    /// If cores are free, this saves the time to wake a thread on another core, which can be most of a fault. Meanwhile
    /// a worker uses its core in full. So it checks only while that finds faults, while no other thread wants its core, while
    /// at most half of the processors have a busy worker, and for half a second of CPU time at most, then for a quarter of the time.
    #[must_use]
    pub fn busy_poll(mut self, time: Duration) -> Self {
        self.busy_poll = time;
        self
    }

    /// The most pages of 4 KiB that one fault installs; one to install only pages that have faulted. Default: 32.
    ///
    /// If the faults of a fork show that it reads its memory in order, pages that it is about to read are installed
    /// together with the one that faults. Their number follows from how many of them are used.
    #[must_use]
    pub fn fault_around(mut self, pages: usize) -> Self {
        self.fault_around = pages;
        self
    }

    /// Sets the callback for every event of every fork. It is called on the threads that serve faults, so it must not
    /// block: send the event to a channel, or count it.
    #[must_use]
    pub fn observer(mut self, observer: impl Fn(ForkEvent) + Send + Sync + 'static) -> Self {
        self.observer = Box::new(observer);
        self
    }

    /// Starts the server's threads.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if a thread or file descriptor cannot be created; [`Error::Unsupported`] if this is not Linux.
    pub fn start(self) -> Result<Server, Error> {
        let failed = |source| Error::System {
            what: "start the server's threads",
            source,
        };
        let acceptor = Arc::new(Inbox::new().map_err(failed)?);
        let registry = Arc::new(Registry::new(self.observer, acceptor::holder(&acceptor)));
        let fill_pool = Arc::new(FillPool::new(self.fill_threads.map(|threads| threads.get() - 1)));
        let options = WorkerOptions {
            fault_deadline: self.deadlines.fault,
            completion_rate: self.completion_rate,
            busy_poll: self.busy_poll,
            fault_around: self.fault_around,
            may_be_raised: priority::may_be_raised(),
        };
        let disposal = Disposal::start().map_err(failed)?;
        let (workers, threads) =
            Workers::start(self.workers, &registry, &fill_pool, &disposal, options).map_err(failed)?;
        let workers = Arc::new(workers);
        let thread = Acceptor::start(
            Arc::clone(&acceptor),
            Arc::clone(&registry),
            Arc::clone(&workers),
            Arc::clone(&disposal),
            self.deadlines,
        )
        .map_err(failed)?;
        let threads = Threads {
            acceptor: thread,
            workers: threads,
        };
        let connect_deadline = self.deadlines.connect;
        Ok(Server::new(
            registry,
            workers,
            acceptor,
            disposal,
            connect_deadline,
            threads,
        ))
    }
}
