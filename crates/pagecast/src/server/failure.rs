//! Why a fork failed, why a VMM was refused.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pagecast_uffd::{Errno, Features};
use serde::Serialize;
use serde::ser::SerializeStruct;

use crate::handshake::{FrameError, LayoutError, ParseError};
use crate::session::Violation;
use crate::template::SourceError;

/// Why a fork failed. Each reason has a stable [`code`](Self::code) for counters and machines.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FailReason {
    /// No VMM connected in time.
    #[error("no VMM connected within {deadline:?}{}", refused_before(*refused))]
    ConnectDeadline {
        /// The time there was.
        deadline: Duration,
        /// How many connections were refused meanwhile: they sent no file descriptor, or were of the wrong user.
        refused: u64,
        /// Why the last of these was.
        #[source]
        last: Option<Arc<Refusal>>,
    },
    /// The VMM was refused: it never got a page.
    #[error("the VMM was refused")]
    Refused(#[source] Refusal),
    /// The VMM did what no VMM does.
    #[error("the VMM broke the protocol")]
    Violation(#[source] Violation),
    /// The template cannot be read any more, or has changed.
    #[error("the template failed")]
    Template(#[source] SourceError),
    /// The template could not be read in time.
    #[error("the template could not be read within {deadline:?}")]
    ReadDeadline {
        /// The time there was.
        deadline: Duration,
    },
    /// The template could not be read in time: every try failed, for a reason that might have passed.
    #[error("the template could not be read: {tries} tries within {time:?} failed")]
    ReadFailed {
        /// How often it was tried.
        tries: u32,
        /// For how long.
        time: Duration,
        /// Why the last try failed.
        #[source]
        source: SourceError,
    },
    /// No memory for a page that a vCPU waits for.
    #[error("no memory for a page within {deadline:?} (host, cgroup of the VMM, or hugepages)")]
    OutOfMemory {
        /// The time there was.
        deadline: Duration,
    },
    /// No memory for a page that nobody waits for: not tried again.
    #[error("no memory for a page (host, cgroup of the VMM, or hugepages)")]
    NoMemoryAhead,
    /// The kernel refused something that it never should.
    #[error("the kernel refused to {operation}: {errno}")]
    Kernel {
        /// What was tried.
        operation: &'static str,
        /// What it said.
        errno: Errno,
    },
    /// The VMM has registered memory again that was just unregistered to complete the fork.
    #[error("the VMM has registered its memory again after it was unregistered for good")]
    RegisteredAgain,
    /// The VMM has made its userfaultfd blocking, so that its faults are not reported any more.
    #[error("the VMM has cleared O_NONBLOCK of its userfaultfd")]
    Blocking,
    /// Its VMM was killed because that was asked for.
    #[error("killed on request")]
    Killed,
    /// It was closed, or the whole server, while it waited for a VMM.
    #[error("closed before a VMM connected")]
    Closed,
}

impl FailReason {
    /// A stable name: lower case, with underscores.
    pub fn code(&self) -> &'static str {
        match self {
            Self::ConnectDeadline { .. } => "connect_deadline",
            Self::Refused(refusal) => refusal.code(),
            Self::Violation(Violation::FaultOutside { .. }) => "fault_outside",
            Self::Violation(Violation::NotMissing { .. }) => "fault_not_missing",
            Self::Violation(Violation::UnexpectedEvent { .. }) => "unexpected_event",
            Self::Violation(Violation::PageLost { .. }) => "page_lost",
            Self::Template(error) => error.code(),
            Self::ReadFailed { source, .. } => source.code(),
            Self::ReadDeadline { .. } => "read_deadline",
            Self::OutOfMemory { .. } | Self::NoMemoryAhead => "out_of_memory",
            Self::Kernel { .. } => "kernel",
            Self::RegisteredAgain => "registered_again",
            Self::Blocking => "blocking",
            Self::Killed => "killed",
            Self::Closed => "closed",
        }
    }
}

impl Serialize for FailReason {
    /// As `{"code", "message"}`, the message with all its causes.
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        serialize_reason(to, self.code(), self)
    }
}

impl Serialize for Refusal {
    /// As `{"code", "message"}`, the message with all its causes.
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        serialize_reason(to, self.code(), self)
    }
}

fn serialize_reason<S: serde::Serializer>(
    to: S,
    code: &str,
    reason: &dyn std::error::Error,
) -> Result<S::Ok, S::Error> {
    let mut object = to.serialize_struct("Reason", 2)?;
    object.serialize_field("code", code)?;
    object.serialize_field("message", &chain(reason))?;
    object.end()
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

fn refused_before(refused: u64) -> String {
    match refused {
        0 => String::new(),
        1 => "; 1 connection was refused".to_owned(),
        _ => format!("; {refused} connections were refused, the last because"),
    }
}

/// Why a connection was refused. It is closed, its file descriptors too, and nobody else notices.
///
/// If it had sent a file descriptor, it was a VMM, and its fork has failed. If not, or if it was of the wrong user, its fork
/// waits on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Run by the wrong user.
    #[error("it runs as user {uid}, not {expected}")]
    WrongUser {
        /// Its user.
        uid: u32,
        /// Whose it should be.
        expected: u32,
    },
    /// It cannot be told who connected.
    #[error("it cannot be told who connected: {message}")]
    Unknown {
        /// Why.
        message: String,
    },
    /// It could not be killed, should that be needed.
    #[error(
        "it could not be killed, should that be needed ({errno}): run the server as root or as the user of the VMM"
    )]
    CannotKill {
        /// What the kernel said.
        errno: Errno,
    },
    /// It said nothing, or not all, in time.
    #[error("the handshake was not complete within {deadline:?}")]
    Deadline {
        /// The time there was.
        deadline: Duration,
    },
    /// It hung up in the middle.
    #[error("it hung up before the handshake was complete")]
    HungUp,
    /// The socket failed.
    #[error("its socket failed: {errno}")]
    Socket {
        /// What the kernel said.
        errno: Errno,
    },
    /// It sent no file descriptor.
    #[error("it sent no userfaultfd")]
    NoFd,
    /// It sent more than one file descriptor.
    #[error("it sent {count} file descriptors instead of one")]
    TooManyFds {
        /// How many.
        count: usize,
    },
    /// It sent file descriptors that could not be taken.
    #[error("it sent file descriptors that could not be taken: too many are open here (see `ulimit -n`)")]
    FdsLost,
    /// What it sent is no userfaultfd.
    #[error("{message}")]
    NotAUffd {
        /// What it is.
        message: String,
    },
    /// The message has no end, or no beginning.
    #[error(transparent)]
    Frame(FrameError),
    /// The message cannot be read.
    #[error(transparent)]
    Parse(ParseError),
    /// The regions cannot be served.
    #[error(transparent)]
    Layout(LayoutError),
    /// Its userfaultfd delivers the wrong things.
    #[error(
        "its userfaultfd has the features {features:?}; it must have EVENT_REMOVE (or memory given back would come back \
         as the template's) and may not have {refused:?}"
    )]
    Features {
        /// What it has.
        features: Features,
        /// What it may not have.
        refused: Features,
    },
    /// Its memory is registered for write protection.
    #[error(
        "its memory at {address:#x} is registered for write protection (UFFDIO_REGISTER_MODE_WP), to track which pages are \
         written: pages that are installed here would not be tracked. Register it for missing pages only"
    )]
    WriteProtected {
        /// Where the region begins, in the memory of the VMM.
        address: u64,
    },
    /// The template is not what it was.
    #[error(transparent)]
    Template(SourceError),
    /// The pool of hugepages, or our own cgroup, is too small for it.
    #[error(
        "it may need {needed} hugepages of 2 MiB and {available} can be had and are not promised to other forks: {}",
        more_hugepages(needed.saturating_sub(*available), cgroup.as_deref())
    )]
    NotEnoughHugepages {
        /// How many it has room for.
        needed: u64,
        /// How many there are for it.
        available: u64,
        /// The cgroup of this process whose limit leaves no more: hugepages are charged to the process that installs them. `None` if
        /// it is the pool.
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

/// An error with all its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
