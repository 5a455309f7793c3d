//! The page server, as the embedding program sees it: [`Server`], its [`Builder`], and [`Fork`], a handle on one fork.

mod builder;
mod fork;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::acceptor::{Listener, Request, Serves};
use super::admission::{self, ZEROS_PATIENCE};
use super::disposal::Disposal;
use super::error::{CloseError, Error};
use super::fork::{FailReason, ForkId, ForkOptions, ForkState};
use super::inbox::Inbox;
use super::registry::{Asker, ForkRecord, Registry};
use super::socket_file::SocketFile;
use super::workers::Workers;
use crate::template::{SourceError, Template};
pub use builder::Builder;
pub use fork::Fork;

/// How long dropping a server waits for its forks to complete before their VMMs are killed.
const DROP_PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait for socket files to be removed. It takes longer only if another process holds up their folder.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(5);

/// A page server.
///
/// Dropping it closes it. If a fork cannot be completed within half a minute, its VMM is killed, since a VMM without
/// its server freezes at its next fault. Call [`close`](Self::close) to choose otherwise.
pub struct Server {
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    acceptor: Arc<Inbox<Request>>,
    disposal: Arc<Disposal>,
    /// How long a fork waits for its VMM.
    connect_deadline: Duration,
    life: Mutex<Life>,
}

enum Life {
    Open(Threads),
    /// Takes no new forks; some old ones are still served.
    Closing(Vec<JoinHandle<()>>),
    Closed,
}

/// The threads of a server.
struct Threads {
    acceptor: JoinHandle<()>,
    workers: Vec<JoinHandle<()>>,
}

impl Server {
    fn new(
        registry: Arc<Registry>,
        workers: Arc<Workers>,
        acceptor: Arc<Inbox<Request>>,
        disposal: Arc<Disposal>,
        connect_deadline: Duration,
        threads: Threads,
    ) -> Self {
        Self {
            registry,
            workers,
            acceptor,
            disposal,
            connect_deadline,
            life: Mutex::new(Life::Open(threads)),
        }
    }

    /// Creates a builder for a server.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Registers a fork of `template`: from now on its VMM can connect to the socket that `options` name. The first
    /// peer that sends a file descriptor is the VMM, and the socket is then removed. Connections that send none are
    /// refused ([`ForkEvent::Refused`](super::ForkEvent::Refused)).
    ///
    /// # Errors
    ///
    /// [`Error::ForkExists`]; [`Error::Template`] if the template has changed or was [withdrawn](Self::withdraw); the
    /// errors of the socket; [`Error::Closed`].
    pub fn register(&self, id: ForkId, template: &Template, options: &ForkOptions) -> Result<Fork, Error> {
        let life = self.life();
        if !matches!(*life, Life::Open(_)) {
            return Err(Error::Closed);
        }
        let record = self.registry.insert(id, template, options, false)?;
        // Checked only now: `withdraw` first marks the template, and then looks for its forks.
        let bound = template
            .check()
            .map_err(Error::Template)
            .and_then(|()| start_reader(template))
            .and_then(|()| self.bind(options));
        let socket = match bound {
            Ok(socket) => socket,
            Err(error) => {
                // The fork was visible for a moment, and a thread may wait for its end.
                record.end(ForkState::Failed, None);
                self.registry.remove(&record);
                return Err(error);
            }
        };
        let serves = Serves::One {
            record: Arc::clone(&record),
            deadline: Instant::now() + self.connect_deadline,
        };
        let listener = Listener::new(socket, expected_user(options), serves);
        self.acceptor.send(Request::Listen(listener));
        drop(life);
        Ok(self.handle(record))
    }

    /// Serves any number of VMMs that connect to the socket that `options` name. Each one gets a fork of `template`,
    /// named `prefix-1`, `prefix-2` and so on, once it sends a file descriptor. A fork is forgotten when it ends; the
    /// [observer](Builder::observer) gets its events.
    ///
    /// # Errors
    ///
    /// [`Error::Prefix`] if the prefix leaves no room for a number; [`Error::Template`] if the template has changed;
    /// the errors of the socket; [`Error::Closed`].
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
            options: options.clone(),
            prefix: prefix.to_string(),
            next: 0,
        };
        let listener = Listener::new(socket, expected_user(options), serves);
        self.acceptor.send(Request::Listen(listener));
        Ok(())
    }

    /// Begins to withdraw a template from all its forks, and returns their number at once. Forks that wait for their
    /// VMM end as failed; forks that are served are killed. The reason is that the template has changed, in the way
    /// that `how` says. The template cannot be forked any more, here or with another server. Forks that are complete or
    /// have ended are left alone, and so are the forks of other templates.
    ///
    /// For a template that is about to be written: before the write, wait for [`wait_withdrawn`](Self::wait_withdrawn).
    pub fn withdraw(&self, template: &Template, how: &str) -> usize {
        template.withdraw(how);
        let forks = self.forks_of(template);
        let changed = || FailReason::Template(SourceError::Changed { how: how.to_owned() });
        forks.iter().filter(|fork| fork.request_kill(changed())).count()
    }

    /// Waits until all forks of a [withdrawn](Self::withdraw) template have ended and no thread reads it, but no longer
    /// than `patience`. After `true`, this server never reads or installs a byte of it again. Returns `false` if that
    /// may still happen: a VMM cannot die, or a read hangs.
    pub fn wait_withdrawn(&self, template: &Template, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let forks = self.forks_of(template);
        forks.iter().all(|fork| fork.wait_state(until, ForkState::is_end)) && template.wait_unread(until)
    }

    /// Takes a template away from its forks as gently as time allows. Within half of `patience`, completes the forks
    /// that can be completed, so that their VMMs live on. Within the other half, [withdraws](Self::withdraw) it from
    /// the rest. Returns `true` once no thread reads it any more, like [`wait_withdrawn`](Self::wait_withdrawn).
    ///
    /// The template must be unchanged meanwhile: call this if a writer waits because of a lease
    /// ([`MemFile::lease`](crate::template::MemFile::lease)).
    pub fn vacate(&self, template: &Template, how: &str, patience: Duration) -> bool {
        let until = Instant::now() + patience / 2;
        if !self.registry.complete_fitting(template, until) && Instant::now() < until {
            template.find_zeros(until.min(Instant::now() + ZEROS_PATIENCE));
            self.registry.complete_fitting(template, until);
        }
        // Returns at once for forks without a request; those are withdrawn below.
        for fork in self.forks_of(template) {
            fork.wait_completed(Asker::Vacator, until);
        }
        self.withdraw(template, how);
        self.wait_withdrawn(template, patience / 2)
    }

    /// The fork with this name; `None` if there is none.
    pub fn fork(&self, id: &ForkId) -> Option<Fork> {
        self.registry.get(id).map(|record| self.handle(record))
    }

    /// All forks, by name.
    pub fn forks(&self) -> Vec<Fork> {
        let forks = self.registry.all().into_iter();
        forks.map(|record| self.handle(record)).collect()
    }

    /// The number of forks that have failed since the start, by the [code](super::FailReason::code) of the reason.
    pub fn failures(&self) -> BTreeMap<&'static str, u64> {
        self.registry.failures()
    }

    /// Closes the server without harm to a VM. Takes no new forks, completes all that are served (installs the rest of
    /// their memory, then unregisters it), and stops its threads. Closing a closed server does nothing.
    ///
    /// # Errors
    ///
    /// [`CloseError::NotEnoughMemory`] if that would drive the host out of memory: the server stays as it was.
    /// [`CloseError::NotComplete`] if it took longer than `patience`: no new forks are taken, the old ones are served.
    pub fn close(&self, patience: Duration) -> Result<(), CloseError> {
        if self.is_closed() {
            return Ok(());
        }
        let until = Instant::now() + patience;
        let forks = self.registry.serving();
        if admission::check_room(&forks).is_err() {
            admission::find_zeros(&forks, until);
            admission::check_room(&forks)?;
        }
        self.stop_accepting();
        let forks = self.registry.serving();
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

    /// Kills the VMMs of all forks and closes the server. May be called while another thread waits in
    /// [`close`](Self::close).
    ///
    /// # Errors
    ///
    /// [`CloseError::NotComplete`] if some VMMs have not died within `patience`.
    pub fn kill(&self, patience: Duration) -> Result<(), CloseError> {
        if self.is_closed() {
            return Ok(());
        }
        self.stop_accepting();
        let forks = self.registry.serving();
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

    /// Creates a socket. If one of an earlier fork is being removed at its path, waits for that.
    fn bind(&self, options: &ForkOptions) -> Result<SocketFile, Error> {
        let path = &options.socket_path;
        self.disposal.wait_removed(path, Instant::now() + REMOVAL_PATIENCE);
        SocketFile::bind(path, options.user, options.group)
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        // A panic under this lock leaves a consistent state.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forks_of(&self, template: &Template) -> Vec<Arc<ForkRecord>> {
        let mut forks = self.registry.all();
        forks.retain(|record| record.template.is_same(template));
        forks
    }

    fn handle(&self, record: Arc<ForkRecord>) -> Fork {
        Fork::new(record, &self.registry)
    }

    fn is_closed(&self) -> bool {
        matches!(*self.life(), Life::Closed)
    }

    fn stop_accepting(&self) {
        let mut life = self.life();
        match std::mem::replace(&mut *life, Life::Closed) {
            Life::Open(threads) => {
                self.acceptor.send(Request::Stop);
                // The acceptor never waits for a peer, so it ends at once.
                let _ = threads.acceptor.join();
                // This process may end next, and no other process removes these files.
                self.disposal.wait_all_removed(Instant::now() + REMOVAL_PATIENCE);
                *life = Life::Closing(threads.workers);
            }
            other => *life = other,
        }
    }

    /// Stops the workers, which have no forks any more.
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
            // If a process cannot die even so, it keeps its worker, and with it its userfaultfd.
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

/// Ensures early, while no fork depends on it, that cold pages of a template can be read.
fn start_reader(template: &Template) -> Result<(), Error> {
    template.start_reader().map_err(|source| Error::System {
        what: "start a thread that reads the template",
        source,
    })
}

fn expected_user(options: &ForkOptions) -> u32 {
    options.user.unwrap_or_else(|| rustix::process::geteuid().as_raw())
}
