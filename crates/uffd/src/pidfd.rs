//! A process that cannot be mistaken for another (`pidfd_open(2)`).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::time::Timespec;

use crate::outcome::Errno;

/// A handle on one process. After the process has died, its ID may be reused; the handle never names another process.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

impl PidFd {
    /// Opens the process that has this ID *now*.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none, or `EINVAL` for an invalid ID.
    pub fn open(pid: i32) -> Result<Self, Errno> {
        let positive = (pid > 0).then_some(pid).and_then(Pid::from_raw);
        let pid = positive.ok_or(Errno::new(libc::EINVAL))?;
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(Errno::from)?;
        Ok(Self { fd })
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Sends SIGKILL. Succeeds if the process has already died.
    ///
    /// # Errors
    ///
    /// `EPERM` if this user may not kill the process.
    pub fn kill(&self) -> Result<(), Errno> {
        match rustix::process::pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Checks that this user may kill the process. Succeeds if the process has already died.
    ///
    /// # Errors
    ///
    /// `EPERM` if it may not.
    pub fn may_kill(&self) -> Result<(), Errno> {
        let no_signal = 0;
        // SAFETY: `pidfd_send_signal(2)` with signal 0 only checks the permission; the file descriptor is open, and a null
        // `siginfo_t` is allowed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                no_signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match std::io::Error::last_os_error().raw_os_error() {
            _ if result == 0 => Ok(()),
            Some(libc::ESRCH) => Ok(()),
            other => Err(Errno::new(other.unwrap_or(libc::EIO))),
        }
    }

    /// Returns `true` if the process has exited with all its threads. A zombie has.
    pub fn has_exited(&self) -> bool {
        let mut poll = [PollFd::new(&self.fd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut poll, Some(&Timespec::default())), Ok(ready) if ready > 0)
    }
}

impl AsFd for PidFd {
    /// Returns a file descriptor that is readable once the process has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_process_has_exited_even_as_a_zombie() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pidfd = PidFd::open(i32::try_from(child.id()).unwrap()).unwrap();
        pidfd.may_kill().unwrap();
        assert!(!pidfd.has_exited());
        pidfd.kill().unwrap();
        // It is readable, so this does not race.
        rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
        assert!(pidfd.has_exited());
        child.wait().unwrap();
        pidfd.kill().expect("killing the dead is no error");
    }

    #[test]
    fn impossible_pids_are_refused() {
        for impossible in [0, -1, i32::MIN] {
            assert_eq!(PidFd::open(impossible).unwrap_err(), Errno::new(libc::EINVAL));
        }
    }
}
