//! File descriptors over a unix stream socket (`SCM_RIGHTS`, `unix(7)`).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::outcome::Errno;

/// Most file descriptors that the kernel lets one message carry (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// One piece of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes received; zero at the end of the stream.
    pub bytes: usize,
    /// Number of file descriptors that came with this piece and were appended.
    pub fds: usize,
    /// The peer sent more file descriptors than this process could receive, as its table is full. The kernel has closed
    /// the rest.
    pub fds_lost: bool,
}

/// Receives one piece without waiting: bytes into `buffer`, file descriptors (close-on-exec) appended to `fds`.
///
/// # Errors
///
/// `EAGAIN` if there is nothing yet; else the kernel's.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Received, Errno> {
    // Has room for the maximum, so that no file descriptor is dropped unseen, and a message with two is noticed.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )
    .map_err(Errno::from)?;
    let before = fds.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(Received {
        bytes: received.bytes,
        fds: fds.len() - before,
        fds_lost: received.flags.contains(ReturnFlags::CTRUNC),
    })
}

/// Sends `bytes` with `fds`, as a VMM does in its handshake. Returns the number of bytes sent.
///
/// # Errors
///
/// `EINVAL` for more than [`MAX_FDS`] file descriptors; else the kernel's.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::new(libc::EINVAL));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map_err(Errno::from)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::io::FdFlags;

    use super::*;

    #[test]
    fn fds_arrive_counted_and_close_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(theirs.as_fd(), b"hello", &[file.as_fd(), file.as_fd()]).unwrap();
        let mut fds = Vec::new();
        let received = receive(ours.as_fd(), &mut [0; 16], &mut fds).unwrap();
        assert_eq!(
            received,
            Received {
                bytes: 5,
                fds: 2,
                fds_lost: false
            }
        );
        for fd in &fds {
            assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn nothing_there_is_eagain_and_the_end_is_zero_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fds = Vec::new();
        let waiting = receive(ours.as_fd(), &mut [0; 16], &mut fds);
        assert_eq!(waiting.unwrap_err().get(), libc::EAGAIN);
        drop(theirs);
        assert_eq!(receive(ours.as_fd(), &mut [0; 16], &mut fds).unwrap().bytes, 0);
    }

    #[test]
    fn as_many_fds_as_the_kernel_allows_are_all_received() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(theirs.as_fd(), b"x", &vec![file.as_fd(); MAX_FDS]).unwrap();
        let mut fds = Vec::new();
        let received = receive(ours.as_fd(), &mut [0; 16], &mut fds).unwrap();
        assert_eq!((received.fds, received.fds_lost), (MAX_FDS, false));
    }
}
