//! The errors of the calls of a server.

use std::path::PathBuf;

use super::fork::{ForkId, ForkState, InvalidForkId};
use crate::template::SourceError;

/// Why a call of the server failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This platform has no userfaultfd: restore with the `File` backend instead.
    #[error("a page server needs Linux; elsewhere, restore with the `File` backend")]
    Unsupported,
    /// The operating system refused a resource that the server needs.
    #[error("cannot {what}")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A fork with this name exists.
    #[error("a fork named {0} exists")]
    ForkExists(ForkId),
    /// The prefix of names leaves no room for a number.
    #[error("the prefix of fork names is too long")]
    Prefix(#[source] InvalidForkId),
    /// The fork's VMM lives, and would hang without the server.
    #[error("the VMM of fork {0} lives and needs the server: complete it or kill it first")]
    ForkInUse(ForkId),
    /// The fork's VMM has not connected, so there is nothing to complete.
    #[error("fork {0} waits for its VMM")]
    ForkWaiting(ForkId),
    /// The fork has ended without being complete.
    #[error("fork {id} has ended: it is {state}")]
    ForkEnded {
        /// Which.
        id: ForkId,
        /// How it ended.
        state: ForkState,
    },
    /// Completing the fork takes more memory than there is.
    #[error(transparent)]
    NotEnoughMemory(#[from] NotEnoughMemory),
    /// The template has changed since it was opened, or cannot be checked.
    #[error("the template cannot be forked")]
    Template(#[source] SourceError),
    /// The path cannot be used for a socket.
    #[error("{} cannot be the path of a socket: {reason}", path.display())]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// Another process listens at the path of the socket.
    #[error("another process listens at {}", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be created.
    #[error("cannot listen at {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The server is closed, or closing.
    #[error("the server is closed")]
    Closed,
}

/// Why a server did not close. It continues to serve; closing can be tried again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloseError {
    /// Completing all forks takes more memory than there is.
    #[error(transparent)]
    NotEnoughMemory(#[from] NotEnoughMemory),
    /// Some forks could not be completed in time; they are served as before.
    #[error("{} forks are not complete: {}", forks.len(), names(forks))]
    NotComplete {
        /// Which.
        forks: Vec<ForkId>,
    },
}

/// Completing forks takes more memory than there is. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "completing {} would install up to {needed} bytes, and {available} are available {place}: free memory, or end or kill \
     some VMMs", count(*forks)
)]
#[non_exhaustive]
pub struct NotEnoughMemory {
    /// The number of forks to complete, with those that are being completed already.
    pub forks: usize,
    /// The memory needed to install the rest, in bytes.
    pub needed: u64,
    /// The memory available for that, in bytes.
    pub available: u64,
    /// The limit: the host, a cgroup, or the pool of hugepages.
    pub place: String,
}

fn count(forks: usize) -> String {
    match forks {
        1 => "1 fork".to_owned(),
        _ => format!("{forks} forks"),
    }
}

fn names(forks: &[ForkId]) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<&str> = forks.iter().take(SHOWN).map(ForkId::as_str).collect();
    if forks.len() > SHOWN {
        names.push("…");
    }
    names.join(", ")
}
