//! Why a connection was refused.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pagecast_uffd::{Errno, Features};

use crate::handshake::{FrameError, LayoutError, ParseError};
use crate::template::SourceError;

/// Why a connection was refused. The connection and the file descriptors that it sent are closed; no other fork is
/// affected.
///
/// If the connection had sent a file descriptor, it was a VMM, and its fork has failed. If not, or if it was of the
/// wrong user, its fork waits on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The process runs as the wrong user.
    #[error("it runs as user {uid}, not {expected}")]
    WrongUser {
        /// The user of the process.
        uid: u32,
        /// The user that is expected.
        expected: u32,
    },
    /// The peer process cannot be identified.
    #[error("the peer is unknown: {message}")]
    Unknown {
        /// Why.
        message: String,
    },
    /// The process could not be killed, should that be needed.
    #[error(
        "it could not be killed, should that be needed ({errno}): run the server as root or as the user of the VMM"
    )]
    CannotKill {
        /// The error of the kernel.
        errno: Errno,
    },
    /// The message was not complete in time.
    #[error("the handshake was not complete within {deadline:?}")]
    Deadline {
        /// The time limit.
        deadline: Duration,
    },
    /// The peer closed the connection before the message was complete.
    #[error("it closed the connection before the handshake was complete")]
    HungUp,
    /// The socket failed.
    #[error("its socket failed: {errno}")]
    Socket {
        /// The error of the kernel.
        errno: Errno,
    },
    /// The peer sent no file descriptor.
    #[error("it sent no userfaultfd")]
    NoFd,
    /// The peer sent more than one file descriptor.
    #[error("it sent {count} file descriptors instead of one")]
    TooManyFds {
        /// The number of file descriptors.
        count: usize,
    },
    /// The peer sent file descriptors that could not be received.
    #[error("it sent file descriptors that could not be received: too many are open here (see `ulimit -n`)")]
    FdsLost,
    /// The file descriptor is no userfaultfd.
    #[error("{message}")]
    NotAUffd {
        /// What it is instead.
        message: String,
    },
    /// The message has no end, or no beginning.
    #[error(transparent)]
    Frame(FrameError),
    /// The message cannot be parsed.
    #[error(transparent)]
    Parse(ParseError),
    /// The regions cannot be served.
    #[error(transparent)]
    Layout(LayoutError),
    /// The features of the userfaultfd cannot be served.
    #[error(
        "its userfaultfd has the features {features:?}; it must have EVENT_REMOVE (or memory given back would come back \
         as the template's) and may not have {refused:?}"
    )]
    Features {
        /// The features that it has.
        features: Features,
        /// The features that it may not have.
        refused: Features,
    },
    /// The memory of the VMM is registered for write protection.
    #[error(
        "its memory at {address:#x} is registered for write protection (UFFDIO_REGISTER_MODE_WP), to track which pages are \
         written: pages that are installed here would not be tracked. Register it for missing pages only"
    )]
    WriteProtected {
        /// The address of the region in the VMM.
        address: u64,
    },
    /// The template has changed.
    #[error(transparent)]
    Template(SourceError),
    /// The pool of hugepages, or our own cgroup, is too small for the fork.
    #[error(
        "it may need {needed} hugepages of 2 MiB and {available} are available and not promised to other forks: {}",
        more_hugepages(needed.saturating_sub(*available), cgroup.as_deref())
    )]
    NotEnoughHugepages {
        /// The number of hugepages in its memory.
        needed: u64,
        /// The number of hugepages available for it.
        available: u64,
        /// The cgroup of this process whose limit leaves no more: hugepages are charged to the process that installs
        /// them. `None` if the pool is the limit.
        cgroup: Option<PathBuf>,
    },
    /// Another VMM was served, or the fork has ended, before this handshake was complete.
    #[error("another VMM was served meanwhile, or the fork has ended")]
    TooLate,
    /// The server is closing.
    #[error("the server is closing")]
    Closing,
}

impl Refusal {
    /// A stable name: lower case, with underscores.
    pub fn code(&self) -> &'static str {
        match self {
            Self::WrongUser { .. } => "wrong_user",
            Self::Unknown { .. } => "unknown_peer",
            Self::CannotKill { .. } => "cannot_kill",
            Self::Deadline { .. } => "handshake_deadline",
            Self::HungUp => "hung_up",
            Self::Socket { .. } => "socket",
            Self::NoFd => "no_fd",
            Self::TooManyFds { .. } => "too_many_fds",
            Self::FdsLost => "fds_lost",
            Self::NotAUffd { .. } => "not_a_uffd",
            Self::Frame(FrameError::TooLong) => "message_too_long",
            Self::Frame(_) => "message_framing",
            Self::Parse(ParseError::NotUtf8(_)) => "message_not_utf8",
            Self::Parse(ParseError::Json(_)) => "message_not_json",
            Self::Parse(ParseError::TooManyRegions { .. }) => "too_many_regions",
            Self::Parse(_) => "page_size",
            Self::Layout(layout) => match layout {
                LayoutError::NoRegions => "no_regions",
                LayoutError::PageSize { .. } => "page_size",
                LayoutError::Empty { .. } => "empty_region",
                LayoutError::Unaligned { .. } => "unaligned",
                LayoutError::AddressOverflow { .. } => "address_overflow",
                LayoutError::PastTheEnd { .. } => "past_the_end",
                LayoutError::OverlapInMemory { .. } => "overlap_in_memory",
                LayoutError::OverlapInTemplate { .. } => "overlap_in_template",
            },
            Self::Features { .. } => "features",
            Self::WriteProtected { .. } => "write_protected",
            Self::Template(error) => error.code(),
            Self::NotEnoughHugepages { .. } => "not_enough_hugepages",
            Self::TooLate => "too_late",
            Self::Closing => "closing",
        }
    }
}

fn more_hugepages(missing: u64, cgroup: Option<&Path>) -> String {
    match cgroup {
        None => format!("raise vm.nr_hugepages or vm.nr_overcommit_hugepages by {missing}"),
        Some(cgroup) => format!(
            "raise hugetlb.2MB.max (version 1: hugetlb.2MB.limit_in_bytes) of the server's own cgroup {} by {} bytes",
            cgroup.display(),
            missing.saturating_mul(2 << 20)
        ),
    }
}
