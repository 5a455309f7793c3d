//! One connection from `connect` to the end of its handshake.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use pagecast_uffd::{Features, Peer, PeerCredentials, Uffd, fd_passing};

use super::failure::{Refusal, chain};
use crate::handshake::{Framer, Layout, parse};
use crate::template::Template;

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

/// A connection whose handshake is not complete.
pub(super) struct Handshaking {
    socket: UnixStream,
    pid: i32,
    /// The process, or why it cannot be served. A connection that sends no file descriptor never hears of that.
    peer: Result<Peer, Refusal>,
    framer: Framer,
    fds: Vec<OwnedFd>,
    fds_lost: bool,
    pub(super) deadline: Instant,
}

/// A VMM that has said all, and whose memory can be served.
pub(super) struct Handshaken {
    pub(super) socket: OwnedFd,
    pub(super) peer: Peer,
    pub(super) uffd: Uffd,
    pub(super) layout: Layout,
}

impl Handshaking {
    /// Checks that the process which `credentials` name is run by the right user.
    pub(super) fn new(
        socket: UnixStream,
        credentials: PeerCredentials,
        expected_user: u32,
        deadline: Instant,
    ) -> Result<Self, Refusal> {
        if credentials.uid != expected_user {
            return Err(Refusal::WrongUser {
                uid: credentials.uid,
                expected: expected_user,
            });
        }
        socket.set_nonblocking(true).map_err(|error| Refusal::Unknown {
            message: error.to_string(),
        })?;
        let peer = Peer::open(socket.as_fd(), credentials).map_err(|error| Refusal::Unknown {
            message: error.to_string(),
        });
        Ok(Self {
            socket,
            pid: credentials.pid,
            peer,
            framer: Framer::default(),
            fds: Vec::new(),
            fds_lost: false,
            deadline,
        })
    }

    /// The process id of the peer; `None` if it is not visible in our pid namespace.
    pub(super) fn pid(&self) -> Option<i32> {
        visible(self.pid)
    }

    /// Whether a file descriptor has come: only a VMM sends one. Probes and health checks do not.
    pub(super) fn has_sent_fd(&self) -> bool {
        self.fds_lost || !self.fds.is_empty()
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
                self.fds_lost = true;
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
    pub(super) fn conclude(mut self, template: &Template) -> Result<Handshaken, Refusal> {
        let fd = self.fds.pop().ok_or(Refusal::NoFd)?;
        let peer = self.peer?;
        peer.pidfd.may_kill().map_err(|errno| Refusal::CannotKill { errno })?;
        let uffd = Uffd::from_received(fd).map_err(|error| Refusal::NotAUffd { message: chain(&error) })?;
        let features = uffd.features();
        if !features.contains(Features::EVENT_REMOVE) || features.intersects(REFUSED_FEATURES) {
            return Err(Refusal::Features {
                features,
                refused: REFUSED_FEATURES,
            });
        }
        let regions = parse(self.framer.bytes()).map_err(Refusal::Parse)?;
        template.check().map_err(Refusal::Template)?;
        let layout = Layout::validate(&regions, template.len()).map_err(Refusal::Layout)?;
        Ok(Handshaken {
            socket: self.socket.into(),
            peer,
            uffd,
            layout,
        })
    }
}

/// A process id of a socket's credentials; `None` for one that is not visible in our pid namespace.
pub(super) fn visible(pid: i32) -> Option<i32> {
    (pid > 0).then_some(pid)
}

impl AsFd for Handshaking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
