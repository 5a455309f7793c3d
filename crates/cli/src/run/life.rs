//! Whether the daemon lives.

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
    /// Of the process that listens at `socket`.
    ///
    /// # Errors
    ///
    /// Nobody does, or it is in a pid namespace that we do not see.
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

    /// Waits until it has ended. May be dropped and called again.
    pub(crate) async fn ended(&self) {
        // It is an error only where the runtime stops.
        let _ = self.pidfd.readable().await;
    }
}
