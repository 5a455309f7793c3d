//! How a server is to be.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use super::acceptor::Acceptor;
use super::deadlines::Deadlines;
use super::disposal::Disposal;
use super::error::Error;
use super::fill_pool::FillPool;
use super::fork_event::ForkEvent;
use super::inbox::Inbox;
use super::page_server::{Server, Threads};
use super::registry::{Observer, Registry};
use super::workers::{WorkerOptions, Workers};
use crate::priority;

/// How many bytes a second a completion installs at most, unless another number is set.
const COMPLETION_RATE: u64 = 1 << 30;

/// How a server is to be.
pub struct Builder {
    workers: Option<usize>,
    deadlines: Deadlines,
    completion_rate: Option<NonZeroU64>,
    fill_threads: Option<NonZeroUsize>,
    busy_poll: Duration,
    observer: Observer,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            workers: None,
            deadlines: Deadlines::default(),
            completion_rate: NonZeroU64::new(COMPLETION_RATE),
            fill_threads: None,
            busy_poll: Duration::ZERO,
            observer: Box::new(|_| {}),
        }
    }

    /// How many threads answer faults; at least one. Forks are spread evenly over them.
    ///
    /// By default two a processor, no more than 16, of which the first forks get one of their own each, while those that come
    /// after them share one a processor, or all where this process may not raise the priority of a thread (`CAP_SYS_NICE`).
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = Some(workers.max(1));
        self
    }

    /// How long to wait for what.
    #[must_use]
    pub fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// How many bytes a second the completion of one fork installs at most, where nobody waits for it; by default 1 GiB,
    /// which leaves others a part of the memory's bandwidth. `None` for as many as can be.
    ///
    /// [`close`](Server::close) and [`vacate`](Server::vacate) do not heed this.
    #[must_use]
    pub fn completion_rate(mut self, bytes_per_second: Option<NonZeroU64>) -> Self {
        self.completion_rate = bytes_per_second;
        self
    }

    /// On how many threads at most a fork is filled (prefaulted, completed) at a time, whatever else runs on this host: on all
    /// of them while no other fork is filled, on one while others have the rest. By default on one, and on as many more as
    /// there are idle processors, at most three.
    #[must_use]
    pub fn fill_threads(mut self, threads: NonZeroUsize) -> Self {
        self.fill_threads = Some(threads);
        self
    }

    /// How long a worker looks for the next fault without sleeping after it has answered one; by default not at all.
    ///
    /// Where cores are free this saves the time that waking a thread on another core takes, which can be most of a fault.
    /// Meanwhile a worker uses its core in full, which is then not there for a vCPU; it sleeps once no fault came for so long.
    #[must_use]
    pub fn busy_poll(mut self, time: Duration) -> Self {
        self.busy_poll = time;
        self
    }

    /// Whom to tell of every turn in the life of every fork. Called on the threads that serve faults, so it must not
    /// block: send it to a channel, count it.
    #[must_use]
    pub fn observer(mut self, observer: impl Fn(ForkEvent) + Send + Sync + 'static) -> Self {
        self.observer = Box::new(observer);
        self
    }

    /// Starts the server's threads.
    ///
    /// # Errors
    ///
    /// [`Error::System`] where a thread or file descriptor cannot be had; [`Error::Unsupported`] where this is not Linux.
    pub fn start(self) -> Result<Server, Error> {
        let failed = |source| Error::System {
            what: "start the server's threads",
            source,
        };
        let acceptor = Arc::new(Inbox::new().map_err(failed)?);
        let registry = Arc::new(Registry::new(self.observer, Arc::clone(&acceptor)));
        let fill_pool = Arc::new(FillPool::new(self.fill_threads.map(|threads| threads.get() - 1)));
        let options = WorkerOptions {
            fault_deadline: self.deadlines.fault,
            completion_rate: self.completion_rate,
            busy_poll: self.busy_poll,
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
