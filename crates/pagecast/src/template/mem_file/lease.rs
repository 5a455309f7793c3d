//! Leases, which hold off writers of a mem-file while forks read it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pagecast_uffd::{Errno, LeaseBreaks, lease};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno as E;

use super::MemFile;
use crate::template::SourceError;

/// How long a writer may take to close the file after it has written it. A child process also holds the files of its
/// parent for a moment, until it executes its program.
const WRITER_PATIENCE: Duration = Duration::from_millis(500);

/// How often to check whether the file is closed; the kernel sends no notice.
const WRITER_PACE: Duration = Duration::from_millis(10);

/// A lease on a [`MemFile`]: opening the file for writing, or truncating it, waits until the lease is dropped.
///
/// The kernel holds up writers by every path and from every process, on file systems where the lease [is
/// sure](Self::is_sure). It does so for at most `/proc/sys/fs/lease-break-time` seconds (usually 45). An open with
/// `O_NONBLOCK` fails at once. Either way the lease is *broken* from then on: it should be dropped soon, and cannot be
/// taken again while a writer has the file open. Readers are not held up, nor are renames and removals, which change no
/// bytes.
///
/// An unbroken lease costs nothing. The kernel reports a break by a signal to a thread of the lease, which has it
/// blocked. The process needs no handler, and its other threads are not interrupted.
#[derive(Debug)]
pub struct Lease {
    mem_file: Arc<MemFile>,
    /// Readable once the thread of the lease should end.
    stop: Arc<OwnedFd>,
}

/// Why there is no lease. Writes to the mem-file are still noticed, by its size, mtime and ctime.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// The mem-file has a lease already.
    #[error("the mem-file already has a lease")]
    Held,
    /// The mem-file is open for writing, or mapped shared and writable.
    #[error("another process has the mem-file open for writing, or mapped shared and writable")]
    OpenForWriting,
    /// The mem-file belongs to another user.
    #[error("the mem-file belongs to another user: take a lease as its owner, or with CAP_LEASE")]
    NotPermitted,
    /// The file system of the mem-file has no leases.
    #[error("the file system of the mem-file has no leases (network file systems, FUSE)")]
    Unsupported,
    /// The mem-file was written before the lease was taken.
    #[error(transparent)]
    Changed(SourceError),
    /// The operating system refused something that a lease needs.
    #[error("cannot {what} for a lease on the mem-file")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl MemFile {
    /// Takes a lease on the file, one at a time. Until a [sure](Lease::is_sure) lease is dropped or broken, the file
    /// cannot be written, and was not written since it was opened.
    ///
    /// If a writer breaks the lease, `on_break` is called once, on the thread of the lease. It should make sure that
    /// the file is not read any more (for example with [`Server::withdraw`](crate::Server::withdraw)), and that the
    /// lease is then dropped.
    ///
    /// Waits for half a second if the file is open for writing.
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
        // If a later step fails, dropping this undoes the earlier ones.
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
                    // The caller of `lease` waits for this.
                    let _ = taken.send(Ok(()));
                    watch(&mem_file, &breaks, &stop, on_break);
                }
                Err(error) => drop(taken.send(Err(error))),
            })
            .map_err(system("start a thread"))?;
        let died = |_| system("keep a thread")(std::io::Error::other("it died"));
        wait.recv().map_err(died)??;
        // From now on the file cannot be written.
        let state = self.state().map_err(LeaseError::Changed)?;
        if self.has_sure_leases() {
            self.unwritten
                .store(state.kept() == self.opened_as(), Ordering::Release);
            self.lease_trust.grant();
        }
        Ok(lease)
    }

    /// Returns `true` if a lease on this file holds off every writer.
    pub(super) fn has_sure_leases(&self) -> bool {
        self.guarantees.leases
    }

    /// Returns `true` if the file cannot have been written since it was opened: it has an unbroken lease, on a file
    /// system where a lease holds off every writer.
    pub(super) fn is_surely_leased(&self) -> bool {
        self.unwritten.load(Ordering::Acquire) && lease::is_held(self.as_fd()).is_ok_and(|held| held)
    }
}

impl Lease {
    /// Returns `true` if the lease holds off every writer. If not, as on overlayfs (whose upper layer can be written by
    /// another path), the file has to be checked all the same.
    pub fn is_sure(&self) -> bool {
        self.mem_file.has_sure_leases()
    }

    /// Returns `true` if a writer waits for the file, or was let in because the lease was held for too long.
    pub fn is_broken(&self) -> bool {
        !lease::is_held(self.mem_file.as_fd()).is_ok_and(|held| held)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.mem_file.lease_trust.revoke();
        self.mem_file.unwritten.store(false, Ordering::Release);
        // The kernel may have taken the lease away, or it was never taken.
        let _ = lease::release(self.mem_file.as_fd());
        self.mem_file.leased.store(false, Ordering::Release);
        // Fails only if the counter is full, which takes more than one drop.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// Takes the lease. The kernel will signal its break to the calling thread.
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
        // Only EINTR is possible for our own file descriptors.
        let _ = rustix::event::poll(&mut polled, None);
        let [stopped, broken] = polled.map(|fd| fd.revents().contains(PollFlags::IN));
        if stopped {
            return;
        }
        if broken {
            breaks.clear();
            // Other processes may send a SIGIO, too.
            if !lease::is_held(mem_file.as_fd()).is_ok_and(|held| held) {
                mem_file.lease_trust.revoke();
                on_break();
                return;
            }
        }
    }
}
