//! Offsets in a template, and runs of its pages.

use std::fmt;

use pagecast_uffd::ByteLen;

/// A position in a template, in bytes from its beginning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TemplateOffset(u64);

impl TemplateOffset {
    /// The position `bytes`.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for TemplateOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for TemplateOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Consecutive small pages (4 KiB) of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The offset of the first page.
    pub at: TemplateOffset,
    /// The length in bytes: whole small pages, at least one.
    pub len: ByteLen,
}
