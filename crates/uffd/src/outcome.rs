//! What an install into a fork's memory came to.

use std::fmt;

use crate::address::ByteLen;

/// The outcome of an install (`UFFDIO_COPY`, `UFFDIO_ZEROPAGE`, `UFFDIO_CONTINUE`).
///
/// The kernel's errno becomes meaning here, once; callers match on this and never on numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// All of it is in place, and whoever waited is awake (unless asked otherwise).
    Installed,
    /// The first `installed` bytes are in place, the rest has to be tried again: the address space is changing (a
    /// `REMOVE` event is unread, or the thread that caused it has not run again), or a later page was there already.
    /// The kernel retries nothing by itself.
    Retry {
        /// Bytes in place, a multiple of the page size; may be zero.
        installed: ByteLen,
    },
    /// The first page is there already. Nobody was woken: a thread that waits for it must be.
    AlreadyPresent,
    /// The range is not registered (any more): unmapped or unregistered.
    NotRegistered,
    /// The address space is gone: its process has exited or executed another program.
    PeerGone,
    /// There is no memory for the page: host, cgroup, or the pool of hugepages.
    OutOfMemory,
    /// Anything else, which is a bug of ours or a page that cannot be read.
    Failed(Errno),
}

/// An error number of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The error with this number (positive, as in `errno(3)`).
    pub const fn new(number: i32) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn get(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&std::io::Error::from_raw_os_error(self.0), f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Errno {}

#[cfg(target_os = "linux")]
impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Self {
        Self(errno.raw_os_error())
    }
}

#[cfg(target_os = "linux")]
impl Outcome {
    /// Reads the result of an install ioctl together with the **signed** progress field it left behind.
    ///
    /// The field holds bytes done, or a negated errno, or (when older kernels turn back early) what was there before the
    /// call: zero. Other programs read it as unsigned and met 18446744073709551605.
    pub(crate) fn of_install(result: rustix::io::Result<()>, progress: i64) -> Self {
        use rustix::io::Errno as E;
        match result {
            Ok(()) => Self::Installed,
            Err(E::AGAIN) => Self::Retry {
                installed: ByteLen::new(u64::try_from(progress).unwrap_or(0)),
            },
            Err(E::EXIST) => Self::AlreadyPresent,
            Err(E::NOENT) => Self::NotRegistered,
            Err(E::SRCH) => Self::PeerGone,
            Err(E::NOMEM) => Self::OutOfMemory,
            Err(other) => Self::Failed(other.into()),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::io::Errno as E;

    use super::*;

    #[test]
    fn progress_is_signed() {
        // -EAGAIN in the progress field, as the kernel leaves it when it turned back before the first page.
        let retry = Outcome::of_install(Err(E::AGAIN), -11);
        assert_eq!(
            retry,
            Outcome::Retry {
                installed: ByteLen::ZERO
            }
        );
        let partial = Outcome::of_install(Err(E::AGAIN), 8192);
        assert_eq!(
            partial,
            Outcome::Retry {
                installed: ByteLen::new(8192)
            }
        );
    }

    #[test]
    fn every_errno_has_one_meaning() {
        assert_eq!(Outcome::of_install(Ok(()), 4096), Outcome::Installed);
        assert_eq!(Outcome::of_install(Err(E::EXIST), -17), Outcome::AlreadyPresent);
        assert_eq!(Outcome::of_install(Err(E::NOENT), -2), Outcome::NotRegistered);
        assert_eq!(Outcome::of_install(Err(E::SRCH), 0), Outcome::PeerGone);
        assert_eq!(Outcome::of_install(Err(E::NOMEM), -12), Outcome::OutOfMemory);
        assert_eq!(Outcome::of_install(Err(E::FAULT), -14), Outcome::Failed(Errno::new(14)));
    }
}
