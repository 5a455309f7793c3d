//! Closes files that peers have sent and removes socket files, on its own threads, because both can block.
//!
//! Closing a file descriptor from a peer waits for the peer if the file is on FUSE. It lingers if the file is a socket
//! with `SO_LINGER`. Users who can read a folder can lock it for any time: a `getdents` into memory whose page
//! fault is not answered holds the lock of the folder, and `unlink` takes it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::socket_file::SocketFile;

/// The maximum number of threads. Each value whose drop blocks takes one.
const MOST_THREADS: usize = 64;

/// How long a thread without work stays. The last one always stays.
const IDLE: Duration = Duration::from_secs(10);

/// Drops values without blocking the caller.
pub(super) struct Disposal {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Socket files that are not removed yet.
    removing: Vec<PathBuf>,
    stopping: bool,
}

enum Job {
    Drop(Box<dyn Send>),
    Remove(SocketFile),
}

impl Disposal {
    /// Starts the first thread.
    pub(super) fn start() -> std::io::Result<Arc<Self>> {
        let this = Self { shared: Arc::default() };
        let mut state = this.shared.state();
        this.shared.start_thread(&mut state)?;
        drop(state);
        Ok(Arc::new(this))
    }

    /// Drops `value` soon, on another thread.
    pub(super) fn drop_later(&self, value: impl Send + 'static) {
        self.add(Job::Drop(Box::new(value)));
    }

    /// Closes a socket and removes its file soon, on another thread.
    pub(super) fn remove_later(&self, socket: SocketFile) {
        self.add(Job::Remove(socket));
    }

    /// Waits until no socket file at `path` is being removed, but no longer than `until`.
    pub(super) fn wait_removed(&self, path: &Path, until: Instant) {
        let is_removed = |state: &State| state.removing.iter().all(|removing| removing != path);
        self.shared.wait(until, is_removed);
    }

    /// Waits until no socket file is being removed.
    pub(super) fn wait_all_removed(&self, until: Instant) -> bool {
        self.shared.wait(until, |state| state.removing.is_empty())
    }

    fn add(&self, job: Job) {
        let mut state = self.shared.state();
        if let Job::Remove(socket) = &job {
            state.removing.push(socket.path().to_owned());
        }
        state.queue.push_back(job);
        if state.queue.len() > state.idle && state.threads < MOST_THREADS {
            // If no thread can be started now, the next idle thread takes the job.
            let _ = self.shared.start_thread(&mut state);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Disposal {
    /// Lets the threads end once the queue is empty, without waiting for them.
    fn drop(&mut self) {
        self.shared.state().stopping = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
        let shared = Arc::clone(self);
        std::thread::Builder::new()
            .name("pagecast-close".to_owned())
            .spawn(move || shared.run())?;
        state.threads += 1;
        Ok(())
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                let removed = match job {
                    Job::Drop(value) => {
                        drop(value);
                        None
                    }
                    Job::Remove(socket) => {
                        let path = socket.path().to_owned();
                        drop(socket);
                        Some(path)
                    }
                };
                state = self.state();
                if let Some(path) = removed
                    && let Some(at) = state.removing.iter().position(|removing| *removing == path)
                {
                    state.removing.swap_remove(at);
                    self.changed.notify_all();
                }
                continue;
            }
            if state.stopping {
                break;
            }
            state.idle += 1;
            let (woken, timeout) = self
                .changed
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() && state.threads > 1 {
                break;
            }
        }
        state.threads -= 1;
    }

    fn wait(&self, until: Instant, wanted: impl Fn(&State) -> bool) -> bool {
        let mut state = self.state();
        loop {
            if wanted(&state) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Reports that its drop has begun, and blocks until its sender is gone.
    struct Blocks(mpsc::Sender<()>, mpsc::Receiver<()>);

    impl Drop for Blocks {
        fn drop(&mut self) {
            let _ = self.0.send(());
            let _ = self.1.recv();
        }
    }

    struct Reports(mpsc::Sender<()>);

    impl Drop for Reports {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }

    #[test]
    fn what_blocks_holds_up_nothing_else() {
        let disposal = Disposal::start().unwrap();
        let (begun, has_begun) = mpsc::channel();
        let mut senders = Vec::new();
        for _ in 0..10 {
            let (sender, blocked) = mpsc::channel();
            senders.push(sender);
            disposal.drop_later(Blocks(begun.clone(), blocked));
        }
        for _ in 0..10 {
            has_begun.recv_timeout(PATIENCE).unwrap();
        }
        let (done, is_done) = mpsc::channel();
        disposal.drop_later(Reports(done));
        is_done.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn all_is_dropped_though_everything_else_blocks_until_later() {
        let disposal = Disposal::start().unwrap();
        let (begun, has_begun) = mpsc::channel();
        let mut senders = Vec::new();
        for _ in 0..MOST_THREADS {
            let (sender, blocked) = mpsc::channel();
            senders.push(sender);
            disposal.drop_later(Blocks(begun.clone(), blocked));
        }
        for _ in 0..MOST_THREADS {
            has_begun.recv_timeout(PATIENCE).unwrap();
        }
        let (done, is_done) = mpsc::channel();
        disposal.drop_later(Reports(done));
        assert_eq!(disposal.shared.state().threads, MOST_THREADS);
        drop(senders);
        drop(disposal);
        is_done.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_socket_file_is_removed_and_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let disposal = Disposal::start().unwrap();
        // None is.
        disposal.wait_removed(&path, Instant::now() + PATIENCE);
        disposal.remove_later(SocketFile::bind(&path, None, None).unwrap());
        disposal.wait_removed(&path, Instant::now() + PATIENCE);
        assert!(!path.exists());
        assert!(disposal.wait_all_removed(Instant::now() + PATIENCE));
    }
}
