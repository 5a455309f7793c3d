//! Peers that break the rules: any handshake, from any process.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pagecast_uffd::{Features, Uffd, UffdOptions, fd_passing};
use serde::{Deserialize, Serialize};

use crate::memory::uffd_without_api;

/// Connects and sends any message.
///
/// Runs in a process of its own, the simulated VMM, since the server may kill its peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RawHandshake {
    /// The socket of the page server.
    pub socket: PathBuf,
    /// The pieces to send, in this order. Empty for a peer that connects and stays silent.
    pub pieces: Vec<Piece>,
    /// Pause between two pieces in milliseconds, so that they do not arrive as one.
    pub pause_ms: u64,
    /// The behaviour after the last piece.
    pub then: Then,
    /// Time to wait for the server to close the connection, in milliseconds.
    pub within_ms: u64,
}

/// One piece of a message, sent by one `sendmsg`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Piece {
    /// Its bytes. If it has none, nothing is sent, no file descriptors either.
    pub bytes: Bytes,
    /// The file descriptors that are sent with it.
    pub fds: Vec<FdKind>,
}

/// Bytes, readable if they are text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bytes {
    /// Valid UTF-8.
    Text(String),
    /// Anything.
    Binary(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Binary(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Binary(bytes.to_owned()),
        }
    }
}

/// A file descriptor to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdKind {
    /// A userfaultfd like Firecracker's, except that nothing is registered.
    Uffd,
    /// A userfaultfd without `UFFDIO_API`.
    UffdWithoutApi,
    /// `/dev/null`.
    DevNull,
    /// One end of a pipe.
    Pipe,
    /// A memfd.
    Memfd,
    /// A TCP socket whose last `close` waits an hour for the other side to read.
    LingeringSocket,
}

/// The behaviour of a peer after its last piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// Keeps the connection open and waits for the server to close it.
    KeepOpen,
    /// Closes the connection at once.
    Close,
    /// Sends its last piece repeatedly, without file descriptors, until the server closes the connection.
    RepeatLast,
}

impl RawHandshake {
    /// Creates a peer that sends `message` in one piece with `fds`, then waits up to a minute for the server to close
    /// the connection.
    pub fn new(socket: impl Into<PathBuf>, message: impl AsRef<[u8]>, fds: &[FdKind]) -> Self {
        Self {
            socket: socket.into(),
            pieces: vec![Piece {
                bytes: Bytes::from(message.as_ref()),
                fds: fds.to_owned(),
            }],
            pause_ms: 0,
            then: Then::KeepOpen,
            within_ms: 60_000,
        }
    }

    /// Creates a peer that connects and stays silent, for up to a minute.
    pub fn silent(socket: impl Into<PathBuf>) -> Self {
        Self {
            pieces: Vec::new(),
            ..Self::new(socket, [], &[])
        }
    }

    /// Cuts the message into pieces of `length` bytes. File descriptors stay with the first piece of theirs.
    #[must_use]
    pub fn in_pieces_of(mut self, length: usize) -> Self {
        self.pieces = self
            .pieces
            .iter()
            .flat_map(|piece| {
                let chunks = piece.bytes.as_slice().chunks(length).enumerate();
                chunks.map(|(index, bytes)| Piece {
                    bytes: Bytes::from(bytes),
                    fds: if index == 0 { piece.fds.clone() } else { Vec::new() },
                })
            })
            .collect();
        self
    }
}

/// The reaction of the server.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RawReport {
    /// Bytes that the kernel accepted for the server, which may not have read them.
    pub sent: u64,
    /// Time from the connect until the server had closed the connection, in microseconds. `None` if it had not in time,
    /// or the peer closed it itself.
    pub closed_after_us: Option<u64>,
}

/// Runs the peer. Returns once the server has closed the connection, after `within_ms` at the latest.
pub(crate) fn play(handshake: &RawHandshake) -> Result<RawReport> {
    let stream = connect(&handshake.socket)?;
    let started = Instant::now();
    let deadline = started + Duration::from_millis(handshake.within_ms);
    let mut report = RawReport {
        sent: 0,
        closed_after_us: None,
    };
    let closed = |report: RawReport| RawReport {
        closed_after_us: Some(micros(started.elapsed())),
        ..report
    };
    for (index, piece) in handshake.pieces.iter().enumerate() {
        if index > 0 && handshake.pause_ms > 0 {
            std::thread::sleep(Duration::from_millis(handshake.pause_ms));
        }
        let fds = piece.fds.iter().map(|kind| open(*kind)).collect::<Result<Vec<_>>>()?;
        match send(&stream, piece.bytes.as_slice(), &fds, deadline)? {
            Sent::All(bytes) => report.sent += bytes,
            Sent::Closed => return Ok(closed(report)),
            Sent::TimedOut => return Ok(report),
        }
    }
    match (handshake.then, handshake.pieces.last()) {
        (Then::Close, _) => return Ok(report),
        (Then::RepeatLast, Some(last)) => loop {
            match send(&stream, last.bytes.as_slice(), &[], deadline)? {
                Sent::All(bytes) if Instant::now() < deadline => report.sent += bytes,
                Sent::Closed => return Ok(closed(report)),
                Sent::All(_) | Sent::TimedOut => return Ok(report),
            }
        },
        (Then::KeepOpen | Then::RepeatLast, _) => {}
    }
    Ok(if await_close(&stream, deadline)? {
        closed(report)
    } else {
        report
    })
}

/// Connects to a page server.
pub(crate) fn connect(socket: &Path) -> Result<UnixStream> {
    UnixStream::connect(socket).with_context(|| format!("failed to connect to {}", socket.display()))
}

/// Waits until the other side has closed the connection. Returns whether it had by the deadline.
pub(crate) fn await_close(mut stream: &UnixStream, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return Ok(true),
            // A page server sends nothing, but bytes are not the end.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(true),
            Err(error) if is_timeout(error.kind()) => {}
            Err(error) => return Err(error).context("failed to wait for the server to hang up"),
        }
    }
}

/// Whole microseconds, for reports.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

enum Sent {
    All(u64),
    Closed,
    TimedOut,
}

fn send(mut stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd], deadline: Instant) -> Result<Sent> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(Sent::TimedOut);
    }
    if bytes.is_empty() {
        return Ok(Sent::All(0));
    }
    stream.set_write_timeout(Some(left))?;
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let outcome = fd_passing::send(stream.as_fd(), bytes, &borrowed)
        .map_err(|errno| std::io::Error::from_raw_os_error(errno.get()))
        .and_then(|taken| stream.write_all(&bytes[taken..]));
    match outcome {
        Ok(()) => Ok(Sent::All(bytes.len() as u64)),
        Err(error) if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => Ok(Sent::Closed),
        Err(error) if is_timeout(error.kind()) => Ok(Sent::TimedOut),
        Err(error) => Err(error).context("failed to send"),
    }
}

fn is_timeout(kind: ErrorKind) -> bool {
    [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted].contains(&kind)
}

fn open(kind: FdKind) -> Result<OwnedFd> {
    Ok(match kind {
        FdKind::Uffd => {
            let uffd = Uffd::create(UffdOptions {
                features: Features::EVENT_REMOVE,
                nonblocking: true,
            })?;
            uffd.as_fd().try_clone_to_owned()?
        }
        FdKind::UffdWithoutApi => uffd_without_api().context("failed to create a userfaultfd")?,
        FdKind::DevNull => std::fs::File::open("/dev/null")?.into(),
        FdKind::Pipe => rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?.0,
        FdKind::LingeringSocket => lingering_socket().context("failed to make a socket that lingers")?,
        FdKind::Memfd => rustix::fs::memfd_create("peer", rustix::fs::MemfdFlags::CLOEXEC)?,
    })
}

fn lingering_socket() -> Result<OwnedFd> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let mut stream = std::net::TcpStream::connect(listener.local_addr()?)?;
    // It reads nothing while this process lives.
    Box::leak(Box::new(listener.accept()?));
    stream.set_nonblocking(true)?;
    let bytes = vec![0; 1 << 16];
    while stream.write(&bytes).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_hours(1)))?;
    Ok(stream.into())
}
