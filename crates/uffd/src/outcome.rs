//! Results of an install into a fork's memory.

use std::fmt;

use crate::address::ByteLen;

/// The result of an install (`UFFDIO_COPY`, `UFFDIO_ZEROPAGE`, `UFFDIO_CONTINUE`).
///
/// It replaces the kernel's errno, so that callers match on the meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// All of the range is installed, and its waiting threads were woken, unless asked otherwise.
    Installed,
    /// The first `installed` bytes are in place; the rest must be retried. Either the address space is changing (a
    /// `REMOVE` event is unread, or the thread that caused it has not run again), or a later page was already present.
    /// The kernel retries nothing by itself.
    Retry {
        /// Bytes in place, a multiple of the page size; may be zero.
        installed: ByteLen,
    },
    /// The first page is already present. No thread was woken: the caller must wake those that wait for it.
    AlreadyPresent,
    /// The range is not registered (any more): unmapped or unregistered.
    NotRegistered,
    /// The address space is gone: its process has exited or executed another program.
    PeerGone,
    /// There is no memory for the page: on the host, in the cgroup, or in the pool of hugepages.
    OutOfMemory,
    /// Any other error: a bug of ours, or a page that cannot be read.
    Failed(Errno),
}

/// An error number of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// Creates the error with this number (positive, as in `errno(3)`).
    pub const fn new(number: i32) -> Self {
        Self(number)
    }

    /// Returns its number.
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
    /// Interprets the result of an install ioctl with the **signed** progress field that it left.
    ///
    /// The field has the number of installed bytes, or a negated errno. Older kernels that return early leave it as it
    /// was before the call: zero. A reader that takes it as unsigned gets 18446744073709551605 for -EAGAIN.
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
        // -EAGAIN in the progress field, as the kernel leaves it when it returns before the first page.
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
