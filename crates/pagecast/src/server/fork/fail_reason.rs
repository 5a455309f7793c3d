//! Why a fork failed.

use std::sync::Arc;
use std::time::Duration;

use pagecast_uffd::Errno;

use super::refusal::Refusal;
use crate::session::Violation;
use crate::template::SourceError;

/// Why a fork failed. Each reason has a stable [`code`](Self::code) for counters and machines.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FailReason {
    /// No VMM connected in time.
    #[error("no VMM connected within {deadline:?}{}", refused_before(*refused))]
    ConnectDeadline {
        /// The time limit.
        deadline: Duration,
        /// The number of connections refused meanwhile: they sent no file descriptor, or were of the wrong user.
        refused: u64,
        /// Why the last one was refused.
        #[source]
        last: Option<Arc<Refusal>>,
    },
    /// The VMM was refused: it never got a page.
    #[error("the VMM was refused")]
    Refused(#[source] Refusal),
    /// The VMM broke the protocol.
    #[error("the VMM broke the protocol")]
    Violation(#[source] Violation),
    /// The template cannot be read any more, or has changed.
    #[error("the template failed")]
    Template(#[source] SourceError),
    /// The template could not be read in time.
    #[error("the template could not be read within {deadline:?}")]
    ReadDeadline {
        /// The time limit.
        deadline: Duration,
    },
    /// The template could not be read in time: every try failed, for a reason that might have passed.
    #[error("the template could not be read: {tries} tries within {time:?} failed")]
    ReadFailed {
        /// The number of tries.
        tries: u32,
        /// The time from the first try on.
        time: Duration,
        /// Why the last try failed.
        #[source]
        source: SourceError,
    },
    /// No memory for a page that a vCPU waits for.
    #[error("no memory for a page within {deadline:?} (host, cgroup of the VMM, or hugepages)")]
    OutOfMemory {
        /// The time limit.
        deadline: Duration,
    },
    /// No memory for a page that no thread waits for. It is not tried again.
    #[error("no memory for a page (host, cgroup of the VMM, or hugepages)")]
    NoMemoryAhead,
    /// The kernel refused an operation that it never should.
    #[error("the kernel refused to {operation}: {errno}")]
    Kernel {
        /// The operation that failed.
        operation: &'static str,
        /// The error of the kernel.
        errno: Errno,
    },
    /// The VMM has registered memory again after it was unregistered to complete the fork.
    #[error("the VMM has registered its memory again after it was unregistered")]
    RegisteredAgain,
    /// The VMM has made its userfaultfd blocking, so that its faults are not reported any more.
    #[error("the VMM has cleared O_NONBLOCK of its userfaultfd")]
    Blocking,
    /// The VMM was killed on request.
    #[error("killed on request")]
    Killed,
    /// The fork or the whole server was closed while the fork waited for a VMM.
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

fn refused_before(refused: u64) -> String {
    match refused {
        0 => String::new(),
        1 => "; 1 connection was refused".to_owned(),
        _ => format!("; {refused} connections were refused, the last because"),
    }
}
