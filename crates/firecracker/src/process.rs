//! A child process with its pidfd.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;

/// A child of this process, for which nothing else waits. Dropping it kills it, without waiting for its end.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    /// Set once the child has been waited for.
    ended: OnceCell<ExitStatus>,
}

impl Process {
    /// Opens the child `pid`, which has not been waited for.
    ///
    /// # Errors
    ///
    /// There is no process `pid`, or no file descriptor is left.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK)?;
        #[expect(
            deprecated,
            reason = "sound for an OwnedFd; what replaces it is unsafe, for types that may change their descriptor"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(Self {
            pid,
            pidfd,
            ended: OnceCell::new(),
        })
    }

    /// Returns the process ID. It is not reused before this is dropped.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the end of the process. Cancel safe.
    ///
    /// # Errors
    ///
    /// The process has been waited for elsewhere.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        self.ended.get_or_try_init(|| self.reap()).await.copied()
    }

    async fn reap(&self) -> io::Result<ExitStatus> {
        // A pidfd stays readable.
        drop(self.pidfd.readable().await?);
        let status = waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), WaitIdOptions::EXITED)?;
        let status = status.ok_or(io::ErrorKind::WouldBlock)?;
        // Encoded as by wait(2).
        let exited = status.exit_status().map(|code| code << 8);
        Ok(ExitStatus::from_raw(
            exited.or(status.terminating_signal()).unwrap_or_default(),
        ))
    }

    /// Kills the process with SIGKILL and waits for its end. Does nothing if it has ended.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub async fn kill(&self) -> io::Result<ExitStatus> {
        self.send_kill()?;
        self.wait().await
    }

    fn send_kill(&self) -> io::Result<()> {
        if self.ended.initialized() {
            return Ok(());
        }
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It is our child: the kernel cannot refuse.
        let _ = self.send_kill();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn child(program: &str, argument: &str) -> Process {
        #[expect(clippy::zombie_processes, reason = "the process that is opened waits")]
        let child = Command::new(program).arg(argument).spawn().unwrap();
        Process::open(i32::try_from(child.id()).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn an_end_is_told_as_often_as_it_is_asked_for() {
        let process = child("sh", "-c");
        assert_eq!(process.wait().await.unwrap().code(), Some(2));
        assert_eq!(process.kill().await.unwrap().code(), Some(2));
    }

    #[tokio::test]
    async fn a_killed_process_has_ended_by_the_signal() {
        let process = child("sleep", "600");
        assert_eq!(process.kill().await.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_dropped_process_is_killed() {
        let process = child("sleep", "600");
        let pidfd = pidfd_open(Pid::from_raw(process.pid()).unwrap(), PidfdFlags::empty()).unwrap();
        drop(process);
        let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).unwrap();
        assert_eq!(status.unwrap().terminating_signal(), Some(9));
    }
}
