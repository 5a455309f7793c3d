//! What goes between a session and its driver.

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

/// What the driver has to do next to answer a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Put a page in place.
    Install(Install),
    /// Wake who waits for this range: the page is there.
    Wake(HostRange),
}

/// Pages to put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Install {
    /// The first page.
    pub(crate) at: PageRef,
    /// How many pages; one for a demand fault.
    pub(crate) pages: usize,
    /// Where they go.
    pub(crate) to: HostRange,
    /// The size of each.
    pub(crate) page_size: PageSize,
    /// What they hold.
    pub(crate) content: Content,
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// The template's bytes from here on.
    Template(TemplateOffset),
    /// Zeros, because the guest gave the page back.
    Zeros,
}

impl Install {
    /// The same, cut to its first `pages` pages (at least one).
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

    /// The same without its first `pages` pages; `None` where it has no more.
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

    /// Its length in bytes, for a buffer.
    pub(crate) fn bytes(&self) -> usize {
        self.pages * self.page_size.as_usize()
    }
}

/// What an event was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// A fault that now waits for its answer.
    Fault {
        /// Where the page is in the template.
        offset: TemplateOffset,
        /// Its size.
        page_size: PageSize,
    },
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
pub(crate) enum After {
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
    #[error("an event that a VMM may not request: {what}")]
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
