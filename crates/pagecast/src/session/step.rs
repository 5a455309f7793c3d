//! What goes between a session and its driver.

use pagecast_uffd::{ByteLen, Errno, FaultFlags, HostAddr, HostRange};

use super::region::RegionIndex;
use crate::page::{PageIndex, PageSize};
use crate::template::TemplateOffset;

/// A page of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRef {
    pub(super) region: RegionIndex,
    pub(super) page: PageIndex,
}

/// What the driver has to do next to answer a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Put a page in place.
    Install(Install),
    /// Wake who waits for this range: the page is there.
    Wake(HostRange),
}

/// Pages to put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Install {
    /// The first page.
    pub at: PageRef,
    /// How many pages; one for a demand fault.
    pub pages: usize,
    /// Where they go.
    pub to: HostRange,
    /// The size of each.
    pub page_size: PageSize,
    /// What they hold.
    pub content: Content,
    /// For whom.
    pub purpose: Purpose,
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The template's bytes from here on.
    Template(TemplateOffset),
    /// Zeros, because the guest gave the page back.
    Zeros,
}

/// For whom a page is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Somebody waits for it.
    Demand,
    /// Nobody does: it is left to do until the fork is complete.
    Fill,
}

/// A run of pages to fill. Some of them may be installed or removed by the time their bytes are there, so what is really
/// installed comes from [`Session::fill_part`](super::Session::fill_part).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillRun {
    pub(super) region: RegionIndex,
    pub(super) first: PageIndex,
    pub(super) pages: usize,
    /// Where their bytes begin in the template.
    pub from: TemplateOffset,
    /// The size of each page.
    pub page_size: PageSize,
}

impl FillRun {
    /// The length of the run, for a buffer.
    pub fn bytes(&self) -> usize {
        self.pages * self.page_size.as_usize()
    }

    /// Where `install`, a part of this run, lies within its bytes.
    pub fn position_of(&self, install: &Install) -> usize {
        install.at.page.get().saturating_sub(self.first.get()) * self.page_size.as_usize()
    }
}

impl Install {
    /// The same, cut to its first `pages` pages (at least one).
    #[must_use]
    pub fn truncated(self, pages: usize) -> Self {
        let pages = pages.clamp(1, self.pages);
        let len = ByteLen::new(pages as u64 * self.page_size.bytes());
        Self {
            pages,
            to: HostRange::new(self.to.start(), len).unwrap_or(self.to),
            ..self
        }
    }

    /// Its length in bytes, for a buffer.
    pub fn bytes(&self) -> usize {
        self.pages * self.page_size.as_usize()
    }
}

/// What an event was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    /// A fault that now waits for its answer.
    Fault,
    /// A fault of a page for which one waits already.
    SameFault,
    /// So many pages were removed.
    Removed {
        /// Their number.
        pages: usize,
    },
}

/// What the outcome of an install leaves to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum After {
    /// Nothing: done.
    Done,
    /// Wake who waits for this range.
    Wake(HostRange),
    /// It has to be tried again after a pause and after reading events.
    Parked,
    /// There was no memory for it. A fault is parked; a fill may as well be given up.
    OutOfMemory,
    /// The fork's address space is gone.
    PeerGone,
    /// The kernel refused it for good.
    Failed(Errno),
}

/// Something a VMM that keeps to its handshake never does. Its faults cannot be answered any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A fault outside every region.
    #[error("a page fault at {address}, outside every region of the handshake")]
    FaultOutside {
        /// Where.
        address: HostAddr,
    },
    /// A fault that a page does not answer.
    #[error("a page fault at {address} that is not a missing page ({flags:?})")]
    NotMissing {
        /// Where.
        address: HostAddr,
        /// Its flags.
        flags: FaultFlags,
    },
    /// An event that the features agreed on do not include.
    #[error("an event that was not agreed on: {what}")]
    UnexpectedEvent {
        /// Which.
        what: &'static str,
    },
    /// A page that was installed is gone, and nothing said so: whatever it held is lost.
    #[error("the page at {address} was installed and never removed, but keeps faulting")]
    PageLost {
        /// Where.
        address: HostAddr,
    },
}
