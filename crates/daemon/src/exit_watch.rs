//! Notices when processes exit, on one thread for any number of them.
//!
//! Uses one `epoll` of pidfds. The runtime's `AsyncFd` has unsafe constructors.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use tracing::error;

use crate::own_thread::survive;
use crate::vmm_process::VmmProcess;

/// Called when a process has exited, on the watching thread. Must not block.
type OnExit = Box<dyn FnOnce() + Send>;

/// Most exits that one `epoll_wait` returns.
const EVENTS: usize = 64;

/// The event data of the stop eventfd. No process has this number.
const STOP: u64 = u64::MAX;

/// Watches processes until it is dropped.
pub(crate) struct ExitWatch {
    shared: Arc<Shared>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    epoll: OwnedFd,
    watched: Mutex<Watched>,
}

#[derive(Default)]
struct Watched {
    next: u64,
    processes: BTreeMap<u64, (Arc<VmmProcess>, OnExit)>,
}

impl ExitWatch {
    /// Starts the thread.
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            watched: Mutex::default(),
        });
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        epoll::add(&shared.epoll, &stop, EventData::new_u64(STOP), EventFlags::IN)?;
        let thread = std::thread::Builder::new().name("exits".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// Calls `on_exit` when the process exits; at once if it has already.
    pub(crate) fn add(&self, vmm: &Arc<VmmProcess>, on_exit: impl FnOnce() + Send + 'static) -> io::Result<()> {
        // Held until `epoll` and the map both have the process, so that its exit is not lost.
        let mut watched = self.shared.watched();
        let number = watched.next;
        epoll::add(&self.shared.epoll, vmm, EventData::new_u64(number), EventFlags::IN)?;
        watched.next += 1;
        watched.processes.insert(number, (Arc::clone(vmm), Box::new(on_exit)));
        Ok(())
    }
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, Watched> {
        // No code that can panic runs under this lock.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return error!(%errno, "exits of VMMs are no longer noticed"),
            }
            for event in &events {
                let number = event.data.u64();
                if number == STOP {
                    return;
                }
                let exited = self.watched().processes.remove(&number);
                if let Some((vmm, on_exit)) = exited {
                    // Removed, since the pidfd of an exited process stays readable.
                    let _ = epoll::delete(&self.epoll, &vmm);
                    survive("exits", on_exit);
                }
            }
        }
    }
}

impl Drop for ExitWatch {
    fn drop(&mut self) {
        // Writing 1 to an eventfd of 0 cannot fail.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            // `on_exit` may drop the last handle of this on the thread itself.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}
