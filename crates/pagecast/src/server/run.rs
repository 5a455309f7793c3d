//! The server as its owner sees it.

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::acceptor::{Acceptor, Request};
use super::crew::Crew;
use super::disposal::Disposal;
use super::error::{CloseError, Error, NotEnoughMemory};
use super::failure::FailReason;
use super::fork::{Deadlines, ForkEvent, ForkId, ForkOptions, ForkState, ForkStatus};
pub use super::handle::Fork;
use super::inbox::Inbox;
use super::listener::{Listener, Serves};
use super::memory;
use super::record::{Asker, ForkRecord};
use super::registry::{Observer, Registry};
use super::socket_file::SocketFile;
use super::workers::{WorkerOptions, Workers};
use crate::priority;
use crate::template::{SourceError, Template};

/// How long dropping a server waits for its forks to complete before their VMMs are killed.
const DROP_PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait for socket files to be removed. It takes longer only if somebody holds up their folder.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(5);

/// How many bytes a second a completion installs at most, where nobody says otherwise.
const COMPLETION_RATE: u64 = 1 << 30;

/// How long completing one fork looks for zeros where memory is short without them.
const ZEROS_PATIENCE: Duration = Duration::from_millis(500);

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
    fn new() -> Self {
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
        let crew = Arc::new(Crew::new(self.fill_threads.map(|threads| threads.get() - 1)));
        let options = WorkerOptions {
            fault_deadline: self.deadlines.fault,
            completion_rate: self.completion_rate,
            busy_poll: self.busy_poll,
            may_be_raised: priority::may_be_raised(),
        };
        let disposal = Disposal::start().map_err(failed)?;
        let (workers, threads) = Workers::start(self.workers, &registry, &crew, &disposal, options).map_err(failed)?;
        let workers = Arc::new(workers);
        let thread = Acceptor::start(
            Arc::clone(&acceptor),
            Arc::clone(&registry),
            Arc::clone(&workers),
            Arc::clone(&disposal),
            self.deadlines,
        )
        .map_err(failed)?;
        Ok(Server {
            registry,
            workers,
            acceptor,
            disposal,
            deadlines: self.deadlines,
            admission: Mutex::new(()),
            life: Mutex::new(Life::Open(Threads {
                acceptor: thread,
                workers: threads,
            })),
        })
    }
}

/// A page server.
///
/// Dropping it closes it; forks that cannot be completed within half a minute have their VMMs killed, since a VMM without
/// its server freezes at its next fault. Call [`close`](Self::close) to decide for yourself.
pub struct Server {
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    acceptor: Arc<Inbox<Request>>,
    disposal: Arc<Disposal>,
    deadlines: Deadlines,
    /// Held between finding room for a completion and asking for it, so that no two are given the same room.
    admission: Mutex<()>,
    life: Mutex<Life>,
}

enum Life {
    Open(Threads),
    /// Takes no new forks; some of the old ones are still served.
    Closing(Vec<JoinHandle<()>>),
    Closed,
}

struct Threads {
    acceptor: JoinHandle<()>,
    workers: Vec<JoinHandle<()>>,
}

impl Server {
    /// A server to be.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Registers a fork of `template`: from now on its VMM can connect to the socket that `options` name. The first that
    /// sends a file descriptor is its VMM, and the socket is gone then; connections that send none are refused
    /// ([`ForkEvent::Refused`]).
    ///
    /// # Errors
    ///
    /// [`Error::ForkExists`], [`Error::Template`] where it has changed or was [withdrawn](Self::withdraw), the socket's errors, [`Error::Closed`].
    pub fn register(&self, id: ForkId, template: &Template, options: &ForkOptions) -> Result<Fork, Error> {
        let life = self.life();
        if !matches!(*life, Life::Open(_)) {
            return Err(Error::Closed);
        }
        let record = self.registry.insert(id, template.clone(), options.plan, false)?;
        // Checked only now: a template that is withdrawn is marked first, and then all its forks are looked for.
        let bound = template
            .check()
            .map_err(Error::Template)
            .and_then(|()| start_reader(template))
            .and_then(|()| self.bind(options));
        let socket = match bound {
            Ok(socket) => socket,
            Err(error) => {
                // It was to be seen for a moment, and whoever saw it may wait for its end.
                record.end(ForkState::Failed, None);
                self.registry.remove(&record);
                return Err(error);
            }
        };
        let serves = Serves::One {
            record: Arc::clone(&record),
            deadline: Instant::now() + self.deadlines.connect,
        };
        let listener = Listener::new(socket, expected_user(options), serves);
        self.acceptor.send(Request::Listen(listener));
        drop(life);
        Ok(Fork {
            record,
            socket_path: options.socket_path.clone(),
        })
    }

    /// Serves any number of VMMs that connect to the socket that `options` name, each a fork of `template` of its own, named
    /// `prefix-1`, `prefix-2` and so on, from when it sends a file descriptor. They are forgotten when they end; the [observer](Builder::observer) hears of
    /// them.
    ///
    /// # Errors
    ///
    /// [`Error::Prefix`] where it leaves no room for a number; [`Error::Template`] where it has changed; the socket's errors;
    /// [`Error::Closed`].
    pub fn listen(&self, prefix: &ForkId, template: &Template, options: &ForkOptions) -> Result<(), Error> {
        let longest = format!("{prefix}-{}", u64::MAX);
        longest.parse::<ForkId>().map_err(Error::Prefix)?;
        let life = self.life();
        if !matches!(*life, Life::Open(_)) {
            return Err(Error::Closed);
        }
        template.check().map_err(Error::Template)?;
        start_reader(template)?;
        let socket = self.bind(options)?;
        let serves = Serves::Any {
            template: template.clone(),
            plan: options.plan,
            prefix: prefix.to_string(),
            next: 0,
        };
        let listener = Listener::new(socket, expected_user(options), serves);
        self.acceptor.send(Request::Listen(listener));
        Ok(())
    }

    /// Begins to complete a fork and returns at once: installs what is left of its memory, then unregisters it. Its state
    /// says when that is done ([`ForkState::Complete`]); where it cannot be, it is served on, and both
    /// [`ForkEvent::NotCompleted`] and the [reason](ForkStatus::reason) in its status say why. Completing what is complete,
    /// or about to be, changes nothing.
    ///
    /// Where the memory would not suffice by what is known of the template's zeros, they are looked for first, for half a
    /// second at most.
    ///
    /// # Errors
    ///
    /// [`Error::ForkNotFound`]; [`Error::ForkWaiting`]; [`Error::ForkEnded`] where its VMM has exited or it has failed;
    /// [`Error::NotEnoughMemory`] where completing it, beside the others that are being completed, would drive the host
    /// out of memory: try again later.
    pub fn complete(&self, id: &ForkId) -> Result<(), Error> {
        let record = self.record(id)?;
        let mut forks = Vec::new();
        let state = self.ask_where_room(&record, &mut forks).or_else(|_| {
            memory::find_zeros(&forks, Instant::now() + ZEROS_PATIENCE);
            self.ask_where_room(&record, &mut forks)
        })?;
        match state {
            ForkState::Serving | ForkState::Complete => Ok(()),
            ForkState::Waiting => Err(Error::ForkWaiting(id.clone())),
            state @ (ForkState::Exited | ForkState::Failed) => Err(Error::ForkEnded { id: id.clone(), state }),
        }
    }

    /// Asks for the completion of a fork that is served if there is room for it and the others that are being completed:
    /// `forks` becomes all of them. The fork's state, which tells whether it was asked for.
    fn ask_where_room(
        &self,
        record: &Arc<ForkRecord>,
        forks: &mut Vec<Arc<ForkRecord>>,
    ) -> Result<ForkState, NotEnoughMemory> {
        // It guards no data, so a panic under it leaves nothing behind.
        let admission = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        *forks = self.serving();
        forks.retain(|fork| Arc::ptr_eq(fork, record) || fork.is_completing());
        if record.state() == ForkState::Serving && !record.is_completing() {
            memory::check_room(forks)?;
        }
        let state = record.request_completion(Asker::Request);
        drop(admission);
        Ok(state)
    }

    /// Asks for the completion of as many forks of a template as there is room for, and time to find that out, for whoever takes
    /// it away. Whether those are all that are served.
    fn complete_fitting(&self, template: &Template, until: Instant) -> bool {
        let admission = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let (completing, mut wanted): (Vec<_>, Vec<_>) =
            self.serving().into_iter().partition(|fork| fork.is_completing());
        wanted.retain(|fork| fork.template.is_same(template));
        let fitting = memory::fitting(&completing, &wanted, until);
        let asked_before = completing.iter().filter(|fork| fork.template.is_same(template));
        for fork in asked_before.chain(&fitting) {
            fork.request_completion(Asker::Vacator);
        }
        drop(admission);
        fitting.len() == wanted.len()
    }

    /// Kills the VMM of a fork and returns at once; its state says when it is dead. A fork that waits for its VMM is
    /// closed instead; one that has ended stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::ForkNotFound`].
    pub fn kill_fork(&self, id: &ForkId) -> Result<(), Error> {
        self.record(id)?.request_kill(FailReason::Killed);
        Ok(())
    }

    /// As [`kill_fork`](Self::kill_fork), but of just this fork: another that has got its name since lives on.
    pub fn kill_this(&self, fork: &Fork) {
        fork.record.request_kill(FailReason::Killed);
    }

    /// Begins to take a template away from its forks, all of them, and returns at once how many those are. Those that
    /// wait for their VMM end as failed; those that are served are killed; the reason of each is that the template has
    /// changed, `how` says in what way. Nobody can fork it any more, here or with another server. What is complete or has
    /// ended is left alone, and so are the forks of all other templates.
    ///
    /// For a template that is about to be written; wait for [`wait_withdrawn`](Self::wait_withdrawn) before it is.
    pub fn withdraw(&self, template: &Template, how: &str) -> usize {
        template.withdraw(how);
        let forks = self.forks_of(template);
        let changed = || FailReason::Template(SourceError::Changed { how: how.to_owned() });
        forks.iter().filter(|fork| fork.request_kill(changed())).count()
    }

    /// Waits until all forks of a [withdrawn](Self::withdraw) template have ended and nothing reads it, but no longer than
    /// `patience`. After `true`, this server neither reads nor installs a byte of it ever again. `false` where something
    /// still may: a VMM that cannot die, a read that hangs.
    pub fn wait_withdrawn(&self, template: &Template, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let forks = self.forks_of(template);
        forks.iter().all(|fork| fork.wait_state(until, ForkState::is_end)) && template.wait_unread(until)
    }

    /// Takes a template away from its forks as gently as there is time for: completes those that can be completed within
    /// half of `patience`, so that their VMMs live on, and [withdraws](Self::withdraw) it from the rest, within the other
    /// half. `true` once nothing reads it any more, as [`wait_withdrawn`](Self::wait_withdrawn) says.
    ///
    /// Meanwhile the template has to be what it was: this is for when somebody *wants* to write it, and is held up by a
    /// lease ([`MemFile::lease`](crate::template::MemFile::lease)).
    pub fn vacate(&self, template: &Template, how: &str, patience: Duration) -> bool {
        let until = Instant::now() + patience / 2;
        if !self.complete_fitting(template, until) && Instant::now() < until {
            template.find_zeros(until.min(Instant::now() + ZEROS_PATIENCE));
            self.complete_fitting(template, until);
        }
        // Those that were not asked are withdrawn from.
        for fork in self.forks_of(template) {
            fork.wait_completed(Asker::Vacator, until);
        }
        self.withdraw(template, how);
        self.wait_withdrawn(template, patience / 2)
    }

    /// Forgets a fork. One that still waits for its VMM is closed.
    ///
    /// # Errors
    ///
    /// [`Error::ForkNotFound`]; [`Error::ForkInUse`] while its VMM needs it.
    pub fn unregister(&self, id: &ForkId) -> Result<(), Error> {
        self.unregister_record(&self.record(id)?)
    }

    /// As [`unregister`](Self::unregister), but of just this fork: another that has got its name since is left alone. One
    /// that is forgotten already stays so.
    ///
    /// # Errors
    ///
    /// [`Error::ForkInUse`] while its VMM needs it.
    pub fn unregister_this(&self, fork: &Fork) -> Result<(), Error> {
        self.unregister_record(&fork.record)
    }

    fn unregister_record(&self, record: &Arc<ForkRecord>) -> Result<(), Error> {
        if record.state() == ForkState::Waiting {
            record.request_close();
            // The acceptor ends it, or is just about to find that its VMM has connected.
            let patience = Instant::now() + self.deadlines.handshake;
            record.wait_state(patience, |state| state != ForkState::Waiting);
        }
        if !record.state().is_end() {
            return Err(Error::ForkInUse(record.id.clone()));
        }
        self.registry.remove(record);
        Ok(())
    }

    /// What is known of a fork; `None` where there is none of this name.
    pub fn fork(&self, id: &ForkId) -> Option<ForkStatus> {
        self.registry.get(id).map(|record| record.status())
    }

    /// What is known of all forks, by name.
    pub fn forks(&self) -> Vec<ForkStatus> {
        self.registry.all().iter().map(|record| record.status()).collect()
    }

    /// How many forks have failed since the start, by the [code](super::FailReason::code) of the reason.
    pub fn failures(&self) -> BTreeMap<&'static str, u64> {
        self.registry.failures()
    }

    /// Closes the server without hurting a VM: takes no new forks, completes all that are served (installs what is left
    /// of their memory, then unregisters it), and stops its threads. Closing a closed server does nothing.
    ///
    /// # Errors
    ///
    /// [`CloseError::NotEnoughMemory`] where that would drive the host out of memory: everything goes on as before.
    /// [`CloseError::NotComplete`] where it took longer than `patience`: no new forks are taken, the old ones are served.
    pub fn close(&self, patience: Duration) -> Result<(), CloseError> {
        if self.is_closed() {
            return Ok(());
        }
        let until = Instant::now() + patience;
        let forks = self.serving();
        if memory::check_room(&forks).is_err() {
            memory::find_zeros(&forks, until);
            memory::check_room(&forks)?;
        }
        self.stop_accepting();
        let forks = self.serving();
        let asker = Asker::Closer(std::thread::current().id());
        for fork in &forks {
            fork.request_completion(asker);
        }
        for fork in &forks {
            fork.wait_completed(asker, until);
        }
        if let Err(error) = all_ended(&forks) {
            for fork in &forks {
                fork.withdraw_completion(asker);
            }
            return Err(error);
        }
        self.stop();
        Ok(())
    }

    /// Kills the VMMs of all forks and closes the server. Also while another thread waits for it to close.
    ///
    /// # Errors
    ///
    /// [`CloseError::NotComplete`] where some have not died within `patience`.
    pub fn kill(&self, patience: Duration) -> Result<(), CloseError> {
        if self.is_closed() {
            return Ok(());
        }
        self.stop_accepting();
        let forks = self.serving();
        for fork in &forks {
            fork.request_kill(FailReason::Killed);
        }
        let until = Instant::now() + patience;
        for fork in &forks {
            fork.wait_state(until, ForkState::is_end);
        }
        all_ended(&forks)?;
        self.stop();
        Ok(())
    }

    /// Makes a socket. One of an earlier fork that is just being removed at its path is waited for.
    fn bind(&self, options: &ForkOptions) -> Result<SocketFile, Error> {
        let path = &options.socket_path;
        self.disposal.wait_removed(path, Instant::now() + REMOVAL_PATIENCE);
        SocketFile::bind(path, options.user, options.group)
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        // A panic under this lock leaves a state that is true all the same.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, id: &ForkId) -> Result<Arc<ForkRecord>, Error> {
        self.registry.get(id).ok_or_else(|| Error::ForkNotFound(id.clone()))
    }

    fn forks_of(&self, template: &Template) -> Vec<Arc<ForkRecord>> {
        let mut forks = self.registry.all();
        forks.retain(|record| record.template.is_same(template));
        forks
    }

    fn serving(&self) -> Vec<Arc<ForkRecord>> {
        let mut forks = self.registry.all();
        forks.retain(|record| record.state() == ForkState::Serving);
        forks
    }

    fn is_closed(&self) -> bool {
        matches!(*self.life(), Life::Closed)
    }

    fn stop_accepting(&self) {
        let mut life = self.life();
        match std::mem::replace(&mut *life, Life::Closed) {
            Life::Open(threads) => {
                self.acceptor.send(Request::Stop);
                // It never waits for anybody, so it comes to this at once.
                let _ = threads.acceptor.join();
                // This process may end next, and nobody else removes them.
                self.disposal.wait_all_removed(Instant::now() + REMOVAL_PATIENCE);
                *life = Life::Closing(threads.workers);
            }
            other => *life = other,
        }
    }

    /// Stops the workers, which have no fork any more.
    fn stop(&self) {
        let mut life = self.life();
        if let Life::Closing(workers) = std::mem::replace(&mut *life, Life::Closed) {
            self.workers.stop();
            for worker in workers {
                let _ = worker.join();
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.close(DROP_PATIENCE).is_err() {
            // Whom this does not reach either (a process that cannot die) keeps its worker, and so its userfaultfd.
            let _ = self.kill(DROP_PATIENCE);
        }
    }
}

fn all_ended(forks: &[Arc<ForkRecord>]) -> Result<(), CloseError> {
    let left: Vec<ForkId> = forks
        .iter()
        .filter(|fork| !fork.state().is_end())
        .map(|fork| fork.id.clone())
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    Err(CloseError::NotComplete { forks: left })
}

/// Makes sure, while nothing depends on it, that cold pages of a template can be read.
fn start_reader(template: &Template) -> Result<(), Error> {
    template.start_reader().map_err(|source| Error::System {
        what: "start a thread that reads the template",
        source,
    })
}

fn expected_user(options: &ForkOptions) -> u32 {
    options.user.unwrap_or_else(|| rustix::process::geteuid().as_raw())
}
