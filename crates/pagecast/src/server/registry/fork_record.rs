//! The record of a fork, shared by all threads that deal with it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::counters::Counters;
use crate::server::error::Error;
use crate::server::fork::{FailReason, ForkId, ForkOptions, ForkState, ForkStatus, Plan, Refusal};
use crate::session::Region;
use crate::template::Template;

/// One fork. Its life is under a lock that the fault path never takes; its counters are atomics that one worker writes.
#[derive(Debug)]
pub(in crate::server) struct ForkRecord {
    pub(in crate::server) id: ForkId,
    /// Distinguishes this fork from others that had its name, or its place in a worker.
    pub(in crate::server) serial: u64,
    pub(in crate::server) template: Template,
    /// The path of the socket that its VMM is to connect to.
    pub(in crate::server) socket_path: PathBuf,
    /// The pages that it gets ahead of its faults, and whether the faults are recorded.
    pub(in crate::server) plan: Plan,
    /// The fork was created for a VMM that connected to a socket of any number of forks. It is forgotten once it has
    /// ended.
    pub(in crate::server) anonymous: bool,
    pub(in crate::server) counters: Counters,
    /// Set by the handshake.
    pub(in crate::server) regions: OnceLock<Box<[Region]>>,
    life: Mutex<Life>,
    changed: Condvar,
}

#[derive(Debug)]
struct Life {
    state: ForkState,
    pid: Option<i32>,
    reason: Option<Arc<FailReason>>,
    /// The thread that has the fork. `None` if the fork is on its way to a worker, which checks the request when the fork
    /// arrives; or has ended.
    holder: Option<Holder>,
    /// The callers that request its completion.
    askers: Vec<Asker>,
    /// Why its VMM is to be killed, once that is requested. Final.
    kill: Option<Arc<FailReason>>,
    /// Connections that were refused and did not end it, by the code of the reason.
    refusals: BTreeMap<&'static str, u64>,
    last_refusal: Option<Arc<Refusal>>,
}

/// The thread that has a fork, as the fork sees it: one that can be notified. Clones notify the same thread.
#[derive(Clone)]
pub(in crate::server) struct Holder {
    notify: Arc<Notify>,
}

/// Notifies a thread that the request for this fork has changed.
type Notify = dyn Fn(&Arc<ForkRecord>) + Send + Sync;

impl Holder {
    /// `notify` is called if the request for a fork has changed. It is called under a lock of the fork, so it may only
    /// send a message.
    pub(in crate::server) fn new(notify: impl Fn(&Arc<ForkRecord>) + Send + Sync + 'static) -> Self {
        Self {
            notify: Arc::new(notify),
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").finish_non_exhaustive()
    }
}

/// A caller that requests the completion of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum Asker {
    /// A caller that requests it for this fork alone, and does not wait.
    Request,
    /// A caller that takes its template away.
    Vacator,
    /// A thread that closes the server. It withdraws its request once its patience is over.
    Closer(ThreadId),
}

/// The action that is requested for a fork.
#[derive(Debug)]
pub(in crate::server) enum Requested {
    /// Answer the faults of the fork.
    Serve,
    /// Complete the fork, and answer its faults meanwhile.
    Complete {
        /// As fast as possible, because a caller waits.
        at_once: bool,
    },
    /// Kill the VMM of the fork.
    Kill(Arc<FailReason>),
}

impl Life {
    fn requested(&self) -> Requested {
        match &self.kill {
            Some(reason) => Requested::Kill(Arc::clone(reason)),
            None if self.askers.is_empty() => Requested::Serve,
            None => Requested::Complete {
                at_once: self.askers.iter().any(|asker| *asker != Asker::Request),
            },
        }
    }
}

impl ForkRecord {
    /// Creates a fork that waits for its VMM. `holder` is the thread that waits for the VMM.
    pub(super) fn new(
        id: ForkId,
        serial: u64,
        template: &Template,
        options: &ForkOptions,
        anonymous: bool,
        holder: Holder,
    ) -> Self {
        Self {
            id,
            serial,
            template: template.clone(),
            socket_path: options.socket_path.clone(),
            plan: options.plan,
            anonymous,
            counters: Counters::new(),
            regions: OnceLock::new(),
            life: Mutex::new(Life {
                state: ForkState::Waiting,
                pid: None,
                reason: None,
                holder: Some(holder),
                askers: Vec::new(),
                kill: None,
                refusals: BTreeMap::new(),
                last_refusal: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        // No code that can panic runs under this lock.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::server) fn status(&self) -> ForkStatus {
        let life = self.life();
        ForkStatus {
            id: self.id.clone(),
            state: life.state,
            pid: life.pid,
            memory_bytes: self.memory_bytes(),
            reason: life.reason.clone(),
            stats: self.counters.stats(),
        }
    }

    pub(in crate::server) fn state(&self) -> ForkState {
        self.life().state
    }

    pub(in crate::server) fn pid(&self) -> Option<i32> {
        self.life().pid
    }

    pub(in crate::server) fn set_pid(&self, pid: i32) {
        self.life().pid = Some(pid);
    }

    /// Counts a connection that was refused while this fork waited or was about to be served.
    pub(in crate::server) fn count_refusal(&self, refusal: &Arc<Refusal>) {
        let mut life = self.life();
        *life.refusals.entry(refusal.code()).or_default() += 1;
        life.last_refusal = Some(Arc::clone(refusal));
    }

    /// The number of connections that were refused without ending the fork, by the code of the reason.
    pub(in crate::server) fn refusals(&self) -> BTreeMap<&'static str, u64> {
        self.life().refusals.clone()
    }

    /// The reason of the failure if no VMM has connected within `deadline`.
    pub(in crate::server) fn not_connected(&self, deadline: Duration) -> FailReason {
        let life = self.life();
        FailReason::ConnectDeadline {
            deadline,
            refused: life.refusals.values().sum(),
            last: life.last_refusal.clone(),
        }
    }

    /// Notes that the VMM has completed its handshake: the fork is on its way to a worker.
    pub(in crate::server) fn set_serving(&self) {
        let mut life = self.life();
        life.state = ForkState::Serving;
        life.holder = None;
        drop(life);
        self.changed.notify_all();
    }

    /// Notes that the fork has come to its worker, which is notified of each later request. For earlier ones, the worker
    /// must check [`requested`](Self::requested) after this.
    pub(in crate::server) fn set_holder(&self, worker: Holder) {
        let mut life = self.life();
        if !life.state.is_end() {
            life.holder = Some(worker);
        }
    }

    /// Ends the fork. Returns `false` and changes nothing if it had ended before.
    pub(in crate::server) fn end(&self, state: ForkState, reason: Option<Arc<FailReason>>) -> bool {
        let mut life = self.life();
        if life.state.is_end() {
            return false;
        }
        life.state = state;
        if reason.is_some() {
            life.reason = reason;
        }
        // Clears all requests, and drops the inbox of the holder, which may itself hold this record.
        life.askers.clear();
        life.kill = None;
        life.holder = None;
        drop(life);
        self.changed.notify_all();
        true
    }

    /// The current request.
    pub(in crate::server) fn requested(&self) -> Requested {
        self.life().requested()
    }

    /// Notifies the thread that has the fork that the request has changed. Called under the lock of the request: the
    /// fork cannot change hands in between, so no request is lost.
    fn notify_holder(self: &Arc<Self>, life: &Life) {
        if let Some(holder) = &life.holder {
            (holder.notify)(self);
        }
    }

    /// Requests to kill the VMM, or to end the fork if it has none. Returns `false` if the fork has ended.
    pub(in crate::server) fn request_kill(self: &Arc<Self>, reason: FailReason) -> bool {
        let mut life = self.life();
        if life.state.is_end() {
            return false;
        }
        if life.kill.is_none() {
            life.kill = Some(Arc::new(reason));
            self.notify_holder(&life);
        }
        true
    }

    /// Requests to end the fork if it waits for its VMM.
    pub(in crate::server) fn request_close(self: &Arc<Self>) {
        let life = self.life();
        if life.state == ForkState::Waiting {
            self.notify_holder(&life);
        }
    }

    /// Returns `true` if the completion is requested, and not done yet.
    pub(in crate::server) fn completion_is_requested(&self) -> bool {
        !self.life().askers.is_empty()
    }

    /// Checks that a fork in this state can still be completed.
    ///
    /// # Errors
    ///
    /// [`Error::ForkWaiting`] and [`Error::ForkEnded`].
    pub(in crate::server) fn may_be_completed(&self, state: ForkState) -> Result<(), Error> {
        let id = self.id.clone();
        match state {
            ForkState::Serving | ForkState::Complete => Ok(()),
            ForkState::Waiting => Err(Error::ForkWaiting(id)),
            ForkState::Exited | ForkState::Failed => Err(Error::ForkEnded { id, state }),
        }
    }

    /// Requests the completion, if the fork is served. Returns the state.
    pub(in crate::server) fn request_completion(self: &Arc<Self>, asker: Asker) -> ForkState {
        let mut life = self.life();
        if life.state == ForkState::Serving && !life.askers.contains(&asker) {
            life.askers.push(asker);
            // The reason of an earlier try.
            life.reason = None;
            self.notify_holder(&life);
        }
        life.state
    }

    /// Withdraws the request of `asker`. Other requests stay.
    pub(in crate::server) fn withdraw_completion(self: &Arc<Self>, asker: Asker) {
        let mut life = self.life();
        if let Some(at) = life.askers.iter().position(|other| *other == asker) {
            life.askers.swap_remove(at);
            self.notify_holder(&life);
        }
    }

    /// Notes that the fork could not be completed and is served as before.
    pub(in crate::server) fn give_up_completion(&self, reason: Arc<FailReason>) {
        let mut life = self.life();
        life.askers.clear();
        life.reason = Some(reason);
        drop(life);
        self.changed.notify_all();
    }

    /// Waits until the fork has ended or the request of `asker` is gone.
    pub(in crate::server) fn wait_completed(&self, asker: Asker, until: Instant) {
        self.wait(until, |life| life.state.is_end() || !life.askers.contains(&asker));
    }

    /// Waits until the state is as wanted. Returns `false` if it is not at `until`.
    pub(in crate::server) fn wait_state(&self, until: Instant, wanted: impl Fn(ForkState) -> bool) -> bool {
        self.wait(until, |life| wanted(life.state))
    }

    fn wait(&self, until: Instant, wanted: impl Fn(&Life) -> bool) -> bool {
        let mut life = self.life();
        loop {
            if wanted(&life) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (woken, _) = self
                .changed
                .wait_timeout(life, left)
                .unwrap_or_else(PoisonError::into_inner);
            life = woken;
        }
    }

    /// The length of its memory in bytes; zero before the handshake.
    pub(in crate::server) fn memory_bytes(&self) -> u64 {
        self.regions
            .get()
            .into_iter()
            .flatten()
            .map(|region| region.memory().len().get())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::inbox::Inbox;

    /// A thread that gets a message each time that it is notified, and its inbox.
    fn thread() -> (Holder, Arc<Inbox<()>>) {
        let inbox = Arc::new(Inbox::new().unwrap());
        let messages = Arc::clone(&inbox);
        (Holder::new(move |_| messages.send(())), inbox)
    }

    /// A fork that waits for its VMM, and the inbox of the acceptor.
    fn waiting() -> (Arc<ForkRecord>, Arc<Inbox<()>>) {
        let (holder, acceptor) = thread();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let template = Template::open(file.path()).unwrap();
        let options = ForkOptions::new("s");
        let id = "a".parse().unwrap();
        let record = ForkRecord::new(id, 1, &template, &options, false, holder);
        (Arc::new(record), acceptor)
    }

    /// A worker's inbox, which the fork has come to.
    fn worker_of(record: &ForkRecord) -> Arc<Inbox<()>> {
        let (holder, inbox) = thread();
        record.set_holder(holder);
        inbox
    }

    #[test]
    fn an_end_is_final() {
        let (record, _acceptor) = waiting();
        assert!(record.end(ForkState::Failed, Some(Arc::new(FailReason::Killed))));
        assert!(!record.end(ForkState::Exited, None));
        assert_eq!(record.state(), ForkState::Failed);
    }

    #[test]
    fn the_thread_that_has_a_fork_is_told_of_each_request_and_no_other_is() {
        let (record, acceptor) = waiting();
        assert_eq!(record.request_completion(Asker::Request), ForkState::Waiting);
        assert!(acceptor.take().is_empty(), "refused, so nothing is requested");
        record.request_close();
        assert_eq!(acceptor.take().len(), 1);

        record.set_serving();
        record.request_completion(Asker::Request);
        let worker = worker_of(&record);
        assert!(acceptor.take().is_empty() && worker.take().is_empty());
        let requested = record.requested();
        assert!(
            matches!(requested, Requested::Complete { at_once: false }),
            "{requested:?}"
        );

        record.request_completion(Asker::Vacator);
        assert!(matches!(record.requested(), Requested::Complete { at_once: true }));
        record.request_completion(Asker::Vacator);
        assert_eq!(worker.take().len(), 1, "the second is nothing new");
        record.withdraw_completion(Asker::Vacator);
        record.withdraw_completion(Asker::Vacator);
        assert_eq!(worker.take().len(), 1);
        assert!(record.request_kill(FailReason::Killed) && record.request_kill(FailReason::Closed));
        assert_eq!(worker.take().len(), 1);
        for _ in 0..2 {
            let requested = record.requested();
            assert!(
                matches!(&requested, Requested::Kill(reason) if reason.code() == "killed"),
                "the first reason stays: {requested:?}"
            );
        }
        assert!(acceptor.take().is_empty());

        record.end(ForkState::Failed, None);
        assert!(!record.request_kill(FailReason::Killed));
        assert!(worker.take().is_empty(), "an ended fork is with no thread");
    }

    /// A fork that holds the inbox that holds it would never be freed.
    #[test]
    fn a_fork_that_has_ended_holds_no_inbox() {
        let (record, acceptor) = waiting();
        record.request_close();
        record.end(ForkState::Failed, None);
        assert_eq!(Arc::strong_count(&acceptor), 1);
    }
}
