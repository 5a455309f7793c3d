//! The end of the daemon.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// The process that listens at a socket.
#[derive(Debug)]
pub(crate) struct Life {
    pidfd: AsyncFd<OwnedFd>,
}

impl Life {
    /// Opens a pidfd of the process that listens at `socket`.
    ///
    /// # Errors
    ///
    /// No process listens, or it is in a PID namespace that we cannot see.
    pub(crate) async fn of_listener(socket: &Path) -> io::Result<Self> {
        let pid = UnixStream::connect(socket).await?.peer_cred()?.pid();
        let pid = pid.and_then(Pid::from_raw).ok_or(io::ErrorKind::Unsupported)?;
        let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        #[expect(
            deprecated,
            reason = "sound for an OwnedFd; what replaces it is unsafe, for types that may change their descriptor"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(Self { pidfd })
    }

    /// Waits until the process has ended. Cancel safe.
    pub(crate) async fn ended(&self) {
        // An error means that the runtime stops.
        let _ = self.pidfd.readable().await;
    }
}
