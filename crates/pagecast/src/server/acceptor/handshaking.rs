//! One connection from `connect` to the end of its handshake.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use pagecast_uffd::{Features, Peer, PeerCredentials, Uffd, fd_passing};

use crate::handshake::{Framer, Layout, parse};
use crate::server::causes::chain;
use crate::server::fork::Refusal;
use crate::template::Template;

/// How many bytes one `recvmsg` takes; the whole message of Firecracker fits several times.
const PIECE: usize = 4096;

/// How many pieces one turn takes before other connections get theirs.
const PIECES_PER_TURN: usize = 16;

/// Features that a userfaultfd may not have. Faults of a forked process or of moved memory could not be answered.
/// SIGBUS and unmap events have no meaning in the protocol.
const REFUSED_FEATURES: Features = Features::EVENT_FORK
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_UNMAP)
    .union(Features::SIGBUS);

/// A connection whose handshake is not complete. Dropping it can block, because it closes the files that the peer has
/// sent.
pub(super) struct Handshaking {
    socket: UnixStream,
    pid: i32,
    /// The process, if it could be opened.
    peer: Option<Peer>,
    /// Why it could not be. A connection that sends no file descriptor does not get this reason.
    unknown: Option<Refusal>,
    framer: Framer,
    fds: Vec<OwnedFd>,
    uffd: Option<Uffd>,
    fds_lost: bool,
    pub(super) deadline: Instant,
}

/// A VMM whose message is complete, and whose memory can be served.
pub(super) struct Handshaken {
    pub(super) socket: OwnedFd,
    pub(super) peer: Peer,
    pub(super) uffd: Uffd,
    pub(super) layout: Layout,
}

impl Handshaking {
    /// Checks that the process in `credentials` runs as the right user.
    pub(super) fn new(
        socket: UnixStream,
        credentials: PeerCredentials,
        expected_user: u32,
        deadline: Instant,
    ) -> Result<Self, (UnixStream, Refusal)> {
        if credentials.uid != expected_user {
            let refusal = Refusal::WrongUser {
                uid: credentials.uid,
                expected: expected_user,
            };
            return Err((socket, refusal));
        }
        if let Err(error) = socket.set_nonblocking(true) {
            let message = error.to_string();
            return Err((socket, Refusal::Unknown { message }));
        }
        let (peer, unknown) = match Peer::open(socket.as_fd(), credentials) {
            Ok(peer) => (Some(peer), None),
            Err(error) => {
                let message = error.to_string();
                (None, Some(Refusal::Unknown { message }))
            }
        };
        Ok(Self {
            socket,
            pid: credentials.pid,
            peer,
            unknown,
            framer: Framer::default(),
            fds: Vec::new(),
            uffd: None,
            fds_lost: false,
            deadline,
        })
    }

    /// The process id of the peer; `None` if it is not visible in our pid namespace.
    pub(super) fn pid(&self) -> Option<i32> {
        visible(self.pid)
    }

    /// Returns `true` if a file descriptor has come: only a VMM sends one. Probes and health checks do not.
    pub(super) fn has_sent_fd(&self) -> bool {
        self.fds_lost || !self.fds.is_empty()
    }

    /// Receives available data. Returns `true` once the message is complete.
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

    /// Checks a complete message against the template. Returns the regions in it.
    pub(super) fn check(&mut self, template: &Template) -> Result<Layout, Refusal> {
        let fd = self.fds.pop().ok_or(Refusal::NoFd)?;
        let uffd = match Uffd::from_received(fd) {
            Ok(uffd) => self.uffd.insert(uffd),
            Err(rejected) => {
                self.fds.push(rejected.fd);
                let message = chain(&rejected.why);
                return Err(Refusal::NotAUffd { message });
            }
        };
        match (&self.peer, self.unknown.take()) {
            (_, Some(unknown)) => return Err(unknown),
            (Some(peer), None) => peer.pidfd.may_kill().map_err(|errno| Refusal::CannotKill { errno })?,
            (None, None) => {}
        }
        let features = uffd.features();
        if !features.contains(Features::EVENT_REMOVE) || features.intersects(REFUSED_FEATURES) {
            return Err(Refusal::Features {
                features,
                refused: REFUSED_FEATURES,
            });
        }
        let regions = parse(self.framer.bytes()).map_err(Refusal::Parse)?;
        match template.check() {
            // Checked again with every page, so a failure that may pass is no reason to refuse a VMM.
            Err(error) if !error.may_pass() => return Err(Refusal::Template(error)),
            _ => {}
        }
        Layout::validate(&regions, template.len()).map_err(Refusal::Layout)
    }

    /// Returns the parts that its fork is served with, once [`check`](Self::check) has returned `layout`.
    pub(super) fn into_handshaken(self, layout: Layout) -> Option<Handshaken> {
        Some(Handshaken {
            socket: self.socket.into(),
            peer: self.peer?,
            uffd: self.uffd?,
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
