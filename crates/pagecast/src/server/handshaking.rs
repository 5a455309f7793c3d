//! One VMM on its way from `connect` to being served.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use pagecast_uffd::{Features, Peer, Uffd, fd_passing};

use super::failure::Refusal;
use super::record::ForkRecord;
use crate::handshake::{Framer, Layout, parse};

/// How many bytes one `recvmsg` takes; Firecracker's whole message fits several times.
const PIECE: usize = 4096;

/// How many pieces one turn takes before others get theirs.
const PIECES_PER_TURN: usize = 16;

/// What a userfaultfd may not deliver: a fork's or moved memory's faults could not be answered, and with SIGBUS, write
/// protection or unmapping nobody has agreed what they would mean.
const REFUSED_FEATURES: Features = Features::EVENT_FORK
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_UNMAP)
    .union(Features::SIGBUS);

/// A VMM that has connected and not yet said all.
pub(super) struct Handshaking {
    socket: UnixStream,
    pub(super) record: Arc<ForkRecord>,
    peer: Peer,
    framer: Framer,
    fds: Vec<OwnedFd>,
    pub(super) deadline: Instant,
}

/// A VMM that has said all, and whose memory can be served.
pub(super) struct Handshaken {
    pub(super) socket: OwnedFd,
    pub(super) record: Arc<ForkRecord>,
    pub(super) peer: Peer,
    pub(super) uffd: Uffd,
    pub(super) layout: Layout,
}

impl Handshaking {
    /// Checks who has connected.
    pub(super) fn new(
        socket: UnixStream,
        record: Arc<ForkRecord>,
        expected_user: u32,
        deadline: Instant,
    ) -> Result<Self, Refusal> {
        let socket_failed = |error: io::Error| Refusal::Unknown {
            message: error.to_string(),
        };
        socket.set_nonblocking(true).map_err(socket_failed)?;
        let peer = Peer::of(socket.as_fd()).map_err(|error| Refusal::Unknown {
            message: error.to_string(),
        })?;
        record.set_pid(peer.pid);
        if peer.uid != expected_user {
            return Err(Refusal::WrongUser {
                uid: peer.uid,
                expected: expected_user,
            });
        }
        peer.pidfd.may_kill().map_err(|errno| Refusal::CannotKill { errno })?;
        Ok(Self {
            socket,
            record,
            peer,
            framer: Framer::default(),
            fds: Vec::new(),
            deadline,
        })
    }

    /// Takes what has come. `true` once the message is complete.
    pub(super) fn receive(&mut self) -> Result<bool, Refusal> {
        let mut piece = [0; PIECE];
        for _ in 0..PIECES_PER_TURN {
            let received = match fd_passing::receive(self.socket.as_fd(), &mut piece, &mut self.fds) {
                Ok(received) => received,
                Err(errno) => {
                    let kind = io::Error::from_raw_os_error(errno.get()).kind();
                    return match kind {
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                        _ => Err(Refusal::Socket { errno }),
                    };
                }
            };
            if received.fds_lost {
                return Err(Refusal::FdsLost);
            }
            if self.fds.len() > 1 {
                return Err(Refusal::TooManyFds { count: self.fds.len() });
            }
            if received.bytes == 0 {
                return Err(Refusal::HungUp);
            }
            let bytes = piece.get(..received.bytes).unwrap_or_default();
            if self.framer.push(bytes).map_err(Refusal::Frame)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Holds a complete message against the template.
    pub(super) fn conclude(mut self) -> Result<Handshaken, Refusal> {
        let fd = self.fds.pop().ok_or(Refusal::NoFd)?;
        let uffd = Uffd::from_received(fd).map_err(|error| Refusal::NotAUffd {
            message: super::failure::chain(&error),
        })?;
        let features = uffd.features();
        if !features.contains(Features::EVENT_REMOVE) || features.intersects(REFUSED_FEATURES) {
            return Err(Refusal::Features {
                features,
                refused: REFUSED_FEATURES,
            });
        }
        let regions = parse(self.framer.bytes()).map_err(Refusal::Parse)?;
        let template = &self.record.template;
        template.check().map_err(Refusal::Template)?;
        let layout = Layout::validate(&regions, template.len()).map_err(Refusal::Layout)?;
        Ok(Handshaken {
            socket: self.socket.into(),
            record: self.record,
            peer: self.peer,
            uffd,
            layout,
        })
    }
}

impl AsFd for Handshaking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
