//! The process at the other end of a unix socket.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::outcome::Errno;
use crate::pidfd::PidFd;

/// Credentials that the kernel noted at `connect` of a unix socket (`unix(7)`, `SO_PEERCRED`).
#[derive(Clone, Copy, Debug)]
pub struct PeerCredentials {
    /// Its process ID in our namespace; 0 if it is not visible there.
    pub pid: i32,
    /// Its effective user ID.
    pub uid: u32,
    /// Its effective group ID.
    pub gid: u32,
}

impl PeerCredentials {
    /// Returns the credentials of the peer of a connected unix stream socket.
    ///
    /// # Errors
    ///
    /// [`PeerError::Credentials`] if the socket has none.
    pub fn of(socket: BorrowedFd<'_>) -> Result<Self, PeerError> {
        let credentials: libc::ucred = getsockopt(socket, libc::SO_PEERCRED).map_err(PeerError::Credentials)?;
        Ok(Self {
            pid: credentials.pid.max(0),
            uid: credentials.uid,
            gid: credentials.gid,
        })
    }
}

/// The process that connected a unix socket.
#[derive(Debug)]
pub struct Peer {
    /// Its process ID in our namespace.
    pub pid: i32,
    /// Its effective user ID.
    pub uid: u32,
    /// Its effective group ID.
    pub gid: u32,
    /// A pidfd of this process.
    pub pidfd: PidFd,
}

/// Why the peer could not be identified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The socket does not name the peer.
    #[error("the socket does not name the process that connected: {0}")]
    Credentials(Errno),
    /// The process is in a PID namespace that is not visible here, so it could not be killed.
    #[error("the process that connected is not visible in this PID namespace")]
    OtherNamespace,
    /// The process is already dead.
    #[error("the process that connected has already exited")]
    Exited,
    /// No pidfd could be opened.
    #[error("no pidfd for the process that connected: {0}")]
    PidFd(Errno),
}

impl Peer {
    /// Opens the process that connected a unix stream socket, whose credentials were read from it.
    ///
    /// The pidfd comes from `SO_PEERPIDFD` (Linux 6.5), which cannot name the wrong process. On older kernels it is
    /// opened by process ID, and the process is then compared with the credentials.
    ///
    /// # Errors
    ///
    /// [`PeerError`] if the process cannot be identified for certain.
    pub fn open(socket: BorrowedFd<'_>, credentials: PeerCredentials) -> Result<Self, PeerError> {
        if credentials.pid == 0 {
            return Err(PeerError::OtherNamespace);
        }
        let pidfd = match getsockopt::<i32>(socket, SO_PEERPIDFD) {
            // SAFETY: the kernel has just made this file descriptor for this call, close-on-exec; nothing else owns it.
            Ok(number) => PidFd::from_fd(unsafe { OwnedFd::from_raw_fd(number) }),
            Err(errno) if errno.get() == libc::ENOPROTOOPT => open_and_compare(&credentials)?,
            // EINVAL and ESRCH: the process is dead and reaped.
            Err(errno) if [libc::EINVAL, libc::ESRCH].contains(&errno.get()) => return Err(PeerError::Exited),
            Err(errno) => return Err(PeerError::PidFd(errno)),
        };
        Ok(Self {
            pid: credentials.pid,
            uid: credentials.uid,
            gid: credentials.gid,
            pidfd,
        })
    }
}

// The constant is small on every architecture (77 on most, 0x404b on parisc).
#[expect(clippy::cast_possible_wrap, reason = "a small constant of the kernel's ABI")]
const SO_PEERPIDFD: i32 = linux_raw_sys::net::SO_PEERPIDFD as i32;

/// Opens a pidfd by process ID and checks that the process is the one of the credentials: the same owner, and alive.
/// Had it died, its ID could belong to another process, which would pass only if it has the same user.
fn open_and_compare(credentials: &PeerCredentials) -> Result<PidFd, PeerError> {
    use std::os::unix::fs::MetadataExt;

    let pidfd = PidFd::open(credentials.pid).map_err(|errno| {
        if errno.get() == libc::ESRCH {
            PeerError::Exited
        } else {
            PeerError::PidFd(errno)
        }
    })?;
    let owner = std::fs::metadata(format!("/proc/{}", credentials.pid)).map_err(|_| PeerError::Exited)?;
    if pidfd.has_exited() || (owner.uid(), owner.gid()) != (credentials.uid, credentials.gid) {
        return Err(PeerError::Exited);
    }
    Ok(pidfd)
}

/// `getsockopt(2)` at level `SOL_SOCKET` for an option whose value is a plain `T`.
fn getsockopt<T: PlainOption>(socket: BorrowedFd<'_>, option: i32) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| Errno::new(libc::EINVAL))?;
    // SAFETY: `value` is writable for `length` bytes, and both pointers live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::new(error.raw_os_error().unwrap_or(libc::EIO)));
    }
    // SAFETY: it was zeroed, the kernel wrote over it at most, and `PlainOption` types take any bytes.
    Ok(unsafe { value.assume_init() })
}

/// A type for which any bytes are a valid value.
///
/// # Safety
///
/// Any bytes must be valid: integers, and `repr(C)` structs of them without padding.
unsafe trait PlainOption {}
// SAFETY: an integer.
unsafe impl PlainOption for i32 {}
// SAFETY: three 32-bit integers.
unsafe impl PlainOption for libc::ucred {}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_of_our_own_pair_is_us() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = Peer::open(a.as_fd(), PeerCredentials::of(a.as_fd()).unwrap()).unwrap();
        assert_eq!(u32::try_from(peer.pid), Ok(std::process::id()));
        assert!(!peer.pidfd.has_exited());
    }

    #[test]
    fn without_peerpidfd_the_process_is_compared_with_the_credentials() {
        let own = PeerCredentials {
            pid: i32::try_from(std::process::id()).unwrap(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        assert!(open_and_compare(&own).is_ok());
        let stranger = PeerCredentials {
            uid: own.uid + 1,
            ..own
        };
        assert!(matches!(open_and_compare(&stranger), Err(PeerError::Exited)));
    }

    #[test]
    fn a_file_has_no_peer() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            PeerCredentials::of(file.as_fd()),
            Err(PeerError::Credentials(_))
        ));
    }
}
