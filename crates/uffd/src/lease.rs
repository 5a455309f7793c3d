//! Read leases on files (`F_SETLEASE` in `fcntl(2)`), which make writers wait.
//!
//! While a lease is held, the kernel holds up every `open` for writing and every `truncate` of the file, by any path
//! and process. They continue once the lease is released, or after `/proc/sys/fs/lease-break-time` seconds (45 by
//! default). An `open` with `O_NONBLOCK` gets `EWOULDBLOCK` instead. Readers do not wait.
//!
//! The kernel reports such a *break* to the holder by SIGIO, whose default action ends the process. So the signal is
//! directed to one thread, which blocks it and reads it from a signalfd: see [`LeaseBreaks`].

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as sys;

use crate::outcome::Errno;

/// Breaks of the leases that one thread has taken. Must stay on that thread, in which SIGIO stays blocked for good.
#[derive(Debug)]
pub struct LeaseBreaks {
    signals: OwnedFd,
    /// A signalfd reads the signals of the thread that reads it.
    on_one_thread: PhantomData<*const ()>,
}

impl LeaseBreaks {
    /// Starts to receive breaks in the calling thread, which should be a thread of its own.
    ///
    /// # Errors
    ///
    /// The kernel's, if there is no file descriptor or memory left.
    pub fn on_this_thread() -> Result<Self, Errno> {
        let sigio = only_sigio();
        // SAFETY: the set is valid and lives through the call; the old set is not asked for. Only the mask of this very
        // thread changes.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const sigio, std::ptr::null_mut()) };
        if result != 0 {
            return Err(Errno::new(result));
        }
        // SAFETY: the set is valid and lives through the call; -1 asks for a new file descriptor.
        let number = unsafe { libc::signalfd(-1, &raw const sigio, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        check(number)?;
        Ok(Self {
            // SAFETY: the kernel has just made this file descriptor, and nothing else knows its number.
            signals: unsafe { OwnedFd::from_raw_fd(number) },
            on_one_thread: PhantomData,
        })
    }

    /// Takes a read lease on `file`, which is open for reading only. An open file description has one lease at most, so
    /// taking it again changes only the receiver of breaks.
    ///
    /// # Errors
    ///
    /// The kernel's: `EAGAIN` if the file is open for writing or mapped shared and writable, `EACCES` if it belongs to
    /// another user (and without `CAP_LEASE`), `EINVAL` if its file system has no leases, …
    pub fn take_read_lease(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let owner = sys::f_owner_ex {
            type_: owner_is_a_thread(),
            pid: rustix::thread::gettid().as_raw_nonzero().get(),
        };
        // Sets the owner first: without one, the kernel would send SIGIO to the whole process, which would end.
        // SAFETY: the command reads a `struct f_owner_ex`, which lives through the call.
        check(unsafe { libc::fcntl(file.as_raw_fd(), command(sys::F_SETOWN_EX), &raw const owner) })?;
        // SAFETY: the command takes a number and touches no memory.
        check(unsafe { libc::fcntl(file.as_raw_fd(), command(sys::F_SETLEASE), libc::F_RDLCK) })
    }

    /// Clears past breaks, so that the file descriptor becomes readable with the next one.
    pub fn clear(&self) {
        // Standard signals do not queue, so one read takes all. An error means that there is none.
        let _ = rustix::io::read(&self.signals, &mut [0; size_of::<libc::signalfd_siginfo>()]);
    }
}

impl AsFd for LeaseBreaks {
    /// Returns a file descriptor that is readable once a lease of this thread is to be broken. It works in this thread
    /// only.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

/// Returns `true` if `file` has a read lease that is not to be broken.
///
/// # Errors
///
/// None is known for an open file.
pub fn is_held(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: the command takes no argument and touches no memory.
    let lease = unsafe { libc::fcntl(file.as_raw_fd(), command(sys::F_GETLEASE)) };
    check(lease)?;
    // While a break is pending, the kernel returns the future state: F_UNLCK.
    Ok(lease == libc::F_RDLCK)
}

/// Releases the lease of `file`. Waiting writers continue.
///
/// # Errors
///
/// `EAGAIN` if there is none, for example because the kernel has broken it.
pub fn release(file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the command takes a number and touches no memory.
    check(unsafe { libc::fcntl(file.as_raw_fd(), command(sys::F_SETLEASE), libc::F_UNLCK) })
}

fn only_sigio() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `set` is writable, and `sigemptyset` initialises all of it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was initialised above.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: the set is initialised and the signal is one.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGIO) };
    set
}

fn check(result: i32) -> Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::new(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// Commands of `fcntl` are small numbers.
#[expect(clippy::cast_possible_wrap, reason = "a small constant of the kernel's ABI")]
const fn command(number: u32) -> i32 {
    number as i32
}

#[expect(clippy::cast_possible_wrap, reason = "a small constant of the kernel's ABI")]
const fn owner_is_a_thread() -> i32 {
    sys::F_OWNER_TID as i32
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs::File;
    use std::io::ErrorKind;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};

    use rustix::event::{PollFd, PollFlags};

    use super::*;

    /// A file of one page, removed after the test.
    struct Leased {
        path: PathBuf,
        file: File,
        breaks: LeaseBreaks,
    }

    impl Leased {
        /// Skips the test if the file system has no leases.
        fn new(name: &str) -> Option<Self> {
            let path = std::env::temp_dir().join(format!("pagecast-{name}-{}", std::process::id()));
            std::fs::write(&path, [7; 4096]).unwrap();
            let file = File::open(&path).unwrap();
            let breaks = LeaseBreaks::on_this_thread().unwrap();
            let leased = Self { path, file, breaks };
            match leased.breaks.take_read_lease(leased.file.as_fd()) {
                Ok(()) => Some(leased),
                Err(errno) if errno.get() == libc::EINVAL => {
                    pagecast_testkit::skip::skip(pagecast_testkit::skip::Need::Leases);
                    None
                }
                Err(errno) => panic!("{errno}"),
            }
        }

        /// Waits for a break, and clears it.
        fn await_break(&self) {
            rustix::event::poll(&mut [PollFd::new(&self.breaks, PollFlags::IN)], None).unwrap();
            self.breaks.clear();
            assert!(!is_held(self.file.as_fd()).unwrap());
        }
    }

    impl Drop for Leased {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn open_to_write(path: &Path) -> std::io::Result<File> {
        File::options().write(true).open(path)
    }

    fn truncate(path: &Path) -> i32 {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a string that ends with a zero and lives through the call.
        unsafe { libc::truncate(path.as_ptr(), 0) }
    }

    // The threads of these tests leave SIGIO at its default, which ends the process.

    #[test]
    fn a_writer_waits_until_the_lease_is_released() {
        let Some(leased) = Leased::new("writer") else { return };
        assert!(is_held(leased.file.as_fd()).unwrap());
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| open_to_write(&leased.path).unwrap());
            leased.await_break();
            assert!(!writer.is_finished());
            release(leased.file.as_fd()).unwrap();
            writer.join().unwrap();
        });
        // The lease is gone, and can be taken again once the file is no longer open for writing.
        assert!(!is_held(leased.file.as_fd()).unwrap());
        assert!(release(leased.file.as_fd()).is_err());
        leased.breaks.take_read_lease(leased.file.as_fd()).unwrap();
        assert!(is_held(leased.file.as_fd()).unwrap());
    }

    #[test]
    fn truncate_waits_until_the_lease_is_released() {
        let Some(leased) = Leased::new("truncate") else { return };
        std::thread::scope(|scope| {
            let truncation = scope.spawn(|| truncate(&leased.path));
            leased.await_break();
            assert_eq!(std::fs::read(&leased.path).unwrap(), [7; 4096]);
            release(leased.file.as_fd()).unwrap();
            assert_eq!(truncation.join().unwrap(), 0);
        });
        assert_eq!(leased.file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn a_writer_that_does_not_wait_is_refused_and_a_reader_is_not() {
        let Some(leased) = Leased::new("nonblock") else { return };
        assert_eq!(std::fs::read(&leased.path).unwrap(), [7; 4096]);
        assert!(is_held(leased.file.as_fd()).unwrap(), "a reader broke it");
        let refused = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&leased.path);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::WouldBlock);
        leased.await_break();
    }

    #[test]
    fn a_file_that_somebody_may_write_gets_no_lease() {
        let Some(leased) = Leased::new("busy") else { return };
        release(leased.file.as_fd()).unwrap();
        let take = || leased.breaks.take_read_lease(leased.file.as_fd());
        let writer = File::options().read(true).write(true).open(&leased.path).unwrap();
        assert_eq!(take(), Err(Errno::new(libc::EAGAIN)));
        // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it.
        let mapping = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                4096,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &writer,
                0,
            )
        }
        .unwrap();
        drop(writer);
        assert_eq!(take(), Err(Errno::new(libc::EAGAIN)), "a mapping can still write");
        // SAFETY: exactly what was mapped, and nothing refers to it.
        unsafe { rustix::mm::munmap(mapping, 4096) }.unwrap();
        assert_eq!(take(), Ok(()));
    }
}
