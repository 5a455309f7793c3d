//! The messages between a session and its driver.

use pagecast_uffd::{ByteLen, Errno, FaultFlags, HostAddr, HostRange};

use super::region::RegionIndex;
use crate::page::{PageIndex, PageSize};
use crate::template::TemplateOffset;

/// A page of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageRef {
    pub(super) region: RegionIndex,
    pub(super) page: PageIndex,
}

/// The next action of the driver, to answer a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Install pages.
    Install(Install),
    /// Wake the threads that wait for this range: the page is there.
    Wake(HostRange),
}

/// Pages to install.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Install {
    /// The first page.
    pub(crate) at: PageRef,
    /// How many pages; one for a demand fault.
    pub(crate) pages: usize,
    /// The address range in the VMM.
    pub(crate) to: HostRange,
    /// The size of each page.
    pub(crate) page_size: PageSize,
    /// The content of the pages.
    pub(crate) content: Content,
}

/// The content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The template's bytes at this offset.
    Template(TemplateOffset),
    /// Zeros, because the guest gave the page back.
    Zeros,
}

impl Install {
    /// Cuts the install to its first `pages` pages (at least one).
    #[must_use]
    pub(crate) fn truncated(self, pages: usize) -> Self {
        let pages = pages.clamp(1, self.pages);
        let len = ByteLen::new(pages as u64 * self.page_size.bytes());
        Self {
            pages,
            to: HostRange::new(self.to.start(), len).unwrap_or(self.to),
            ..self
        }
    }

    /// The install without its first `pages` pages; `None` if it has no more.
    pub(crate) fn after(self, pages: usize) -> Option<Self> {
        let left = self.pages.checked_sub(pages).filter(|left| *left > 0)?;
        let skipped = ByteLen::new(pages as u64 * self.page_size.bytes());
        let content = match self.content {
            Content::Template(from) => Content::Template(TemplateOffset::new(from.get() + skipped.get())),
            Content::Zeros => Content::Zeros,
        };
        Some(Self {
            at: PageRef {
                region: self.at.region,
                page: PageIndex::new(self.at.page.get() + pages),
            },
            pages: left,
            to: HostRange::between(HostAddr::new(self.to.start().get() + skipped.get()), self.to.end())?,
            content,
            ..self
        })
    }

    /// The number of pages between the first of `other`, which is not after it, and its own first.
    pub(crate) fn pages_after(&self, other: &Self) -> usize {
        self.at.page.get().saturating_sub(other.at.page.get())
    }

    /// The length in bytes, for a buffer.
    pub(crate) fn bytes(&self) -> usize {
        self.pages * self.page_size.as_usize()
    }
}

/// The kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// A fault that now waits for its answer.
    Fault {
        /// The template offset of the page.
        offset: TemplateOffset,
        /// The size of the page.
        page_size: PageSize,
    },
    /// A fault of a page that another fault waits for already.
    SameFault,
    /// Pages were removed.
    Removed {
        /// Their number.
        pages: usize,
    },
}

/// The work that the outcome of an install leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum After {
    /// Nothing: done.
    Done,
    /// Wake the threads that wait for this range.
    Wake(HostRange),
    /// Try it again after a pause and after reading events.
    Parked,
    /// There was no memory for the pages. A fault is parked; a fill may as well be given up.
    OutOfMemory,
    /// The fork's address space is gone.
    PeerGone,
    /// The kernel refused the install for good.
    Failed(Errno),
}

/// An event that a VMM never causes if it keeps to its handshake. Its faults cannot be answered any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A fault outside every region.
    #[error("a page fault at {address}, outside every region of the handshake")]
    FaultOutside {
        /// The address.
        address: HostAddr,
    },
    /// A fault that installing a page does not answer.
    #[error("a page fault at {address} that is not a missing page ({flags:?})")]
    NotMissing {
        /// The address.
        address: HostAddr,
        /// Its flags.
        flags: FaultFlags,
    },
    /// An event that the agreed features do not include.
    #[error("an event that a VMM may not request: {what}")]
    UnexpectedEvent {
        /// Which.
        what: &'static str,
    },
    /// An installed page is gone without an event: its content is lost.
    #[error("the page at {address} was installed and never removed, but keeps faulting")]
    PageLost {
        /// The address.
        address: HostAddr,
    },
}
