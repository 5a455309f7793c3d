//! Holding writers off a mem-file for as long as forks read it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pagecast_uffd::{Errno, LeaseBreaks, lease};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno as E;

use super::MemFile;
use crate::template::SourceError;

/// How long somebody may take to close the file who has just written it. Also a program that is just being started by
/// somebody who has it open holds it for a moment.
const WRITER_PATIENCE: Duration = Duration::from_millis(500);

/// How often we look whether it is closed; the kernel does not tell.
const WRITER_PACE: Duration = Duration::from_millis(10);

/// A lease on a [`MemFile`]: whoever opens the file for writing, or truncates it, waits until this is dropped.
///
/// The kernel holds them up, whatever path and process they come from, for `/proc/sys/fs/lease-break-time` seconds at most
/// (45 as a rule), on file systems where [it is sure](Self::is_sure); an open with `O_NONBLOCK` is refused at once. Either way the lease is *broken* from then on: it
/// should be dropped soon, and cannot be taken back before nobody writes any more. Readers are not held up, nor are renaming
/// and removing, which change no bytes.
///
/// It costs nothing while nothing happens. The signal by which the kernel tells of a break goes to a thread of the lease's
/// own, which blocks it; the process needs no handler, and its other threads are not interrupted.
#[derive(Debug)]
pub struct Lease {
    mem_file: Arc<MemFile>,
    /// Readable once the thread is to end.
    stop: Arc<OwnedFd>,
}

/// Why there is no lease. Writes to the mem-file are still noticed, by what they leave behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// The mem-file has a lease.
    #[error("the mem-file already has a lease")]
    Held,
    /// Somebody has it open for writing, or mapped so that it can be written.
    #[error("another process has the mem-file open for writing, or mapped shared and writable")]
    OpenForWriting,
    /// It belongs to another user.
    #[error("the mem-file belongs to another user: take a lease as its owner, or with CAP_LEASE")]
    NotPermitted,
    /// Its file system has no leases.
    #[error("the file system of the mem-file has no leases (network file systems, FUSE)")]
    Unsupported,
    /// It was written before the lease was there.
    #[error(transparent)]
    Changed(SourceError),
    /// The operating system refused something that a lease needs.
    #[error("cannot {what} for a lease on the mem-file")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl MemFile {
    /// Takes a lease on the file, one at a time: until it is dropped or broken, nobody can write the file, and nobody has
    /// since it was opened.
    ///
    /// When somebody wants to, and so breaks the lease, `on_break` is called once, on a thread of the lease's own. It should
    /// see to it that the file is not read any more (such as by [`Server::withdraw`](crate::Server::withdraw)) and that the
    /// lease is dropped then.
    ///
    /// Waits for half a second where somebody has the file open for writing.
    ///
    /// # Errors
    ///
    /// [`LeaseError`].
    pub fn lease(self: &Arc<Self>, on_break: impl FnOnce() + Send + 'static) -> Result<Lease, LeaseError> {
        let system = |what| move |source| LeaseError::System { what, source };
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| system("make an eventfd")(errno.into()))?;
        let stop = Arc::new(stop);
        if self.leased.swap(true, Ordering::AcqRel) {
            return Err(LeaseError::Held);
        }
        // Dropped, it also undoes what is there by then, whatever goes wrong.
        let lease = Lease {
            mem_file: Arc::clone(self),
            stop: Arc::clone(&stop),
        };
        let (taken, wait) = mpsc::channel();
        let mem_file = Arc::clone(self);
        std::thread::Builder::new()
            .name("pagecast-lease".to_owned())
            .spawn(move || match take(&mem_file) {
                Ok(breaks) => {
                    // Whoever took it waits for this.
                    let _ = taken.send(Ok(()));
                    watch(&mem_file, &breaks, &stop, on_break);
                }
                Err(error) => drop(taken.send(Err(error))),
            })
            .map_err(system("start a thread"))?;
        let died = |_| system("keep a thread")(std::io::Error::other("it died"));
        wait.recv().map_err(died)??;
        // Nobody can have written it since this.
        let state = self.state().map_err(LeaseError::Changed)?;
        if self.has_sure_leases() {
            self.unwritten
                .store(state.kept() == self.opened_as(), Ordering::Release);
            self.lease_trust.grant();
        }
        Ok(lease)
    }

    /// Whether a lease on it holds off every writer.
    pub(in crate::template) fn has_sure_leases(&self) -> bool {
        self.guarantees.leases
    }

    /// Whether nobody can have written it since it was opened: there is a lease on it that nobody has broken, on a file
    /// system where that holds off every writer.
    pub(in crate::template) fn is_surely_leased(&self) -> bool {
        self.unwritten.load(Ordering::Acquire) && lease::is_held(self.as_fd()).is_ok_and(|held| held)
    }
}

impl Lease {
    /// Whether it holds off every writer. Where it does not, as on overlayfs (whose upper layer can be written by another
    /// path), the file has to be looked at all the same.
    pub fn is_sure(&self) -> bool {
        self.mem_file.has_sure_leases()
    }

    /// Whether somebody waits to write the file, or does so already because the lease was held for too long since.
    pub fn is_broken(&self) -> bool {
        !lease::is_held(self.mem_file.as_fd()).is_ok_and(|held| held)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.mem_file.lease_trust.revoke();
        self.mem_file.unwritten.store(false, Ordering::Release);
        // It may be gone: taken away, or never taken.
        let _ = lease::release(self.mem_file.as_fd());
        self.mem_file.leased.store(false, Ordering::Release);
        // Fails only where the counter is full, which takes more drops than one.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// Takes the lease, for the calling thread to be told of its break.
fn take(mem_file: &MemFile) -> Result<LeaseBreaks, LeaseError> {
    let system = |what, errno: Errno| LeaseError::System {
        what,
        source: std::io::Error::from_raw_os_error(errno.get()),
    };
    let breaks = LeaseBreaks::on_this_thread().map_err(|errno| system("wait for signals", errno))?;
    let until = Instant::now() + WRITER_PATIENCE;
    let taken = loop {
        match breaks.take_read_lease(mem_file.as_fd()) {
            Err(errno) if E::from_raw_os_error(errno.get()) == E::AGAIN && Instant::now() < until => {
                std::thread::sleep(WRITER_PACE);
            }
            taken => break taken,
        }
    };
    match taken {
        Ok(()) => Ok(breaks),
        Err(errno) => Err(match E::from_raw_os_error(errno.get()) {
            E::AGAIN => LeaseError::OpenForWriting,
            E::ACCESS | E::PERM => LeaseError::NotPermitted,
            E::INVAL | E::OPNOTSUPP => LeaseError::Unsupported,
            _ => system("ask the kernel", errno),
        }),
    }
}

/// Waits until the lease is broken or dropped.
fn watch(mem_file: &MemFile, breaks: &LeaseBreaks, stop: &OwnedFd, on_break: impl FnOnce()) {
    loop {
        let mut polled = [PollFd::new(stop, PollFlags::IN), PollFd::new(breaks, PollFlags::IN)];
        // Only EINTR is possible for file descriptors of our own.
        let _ = rustix::event::poll(&mut polled, None);
        let [stopped, broken] = polled.map(|fd| fd.revents().contains(PollFlags::IN));
        if stopped {
            return;
        }
        if broken {
            breaks.clear();
            // Anybody may send a SIGIO.
            if !lease::is_held(mem_file.as_fd()).is_ok_and(|held| held) {
                mem_file.lease_trust.revoke();
                on_break();
                return;
            }
        }
    }
}
