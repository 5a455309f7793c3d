//! Pages: their sizes and their numbers.

use std::fmt;

use pagecast_uffd::ByteLen;

/// The size of a guest's pages, which is also the unit of installs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB: ordinary anonymous memory.
    Small,
    /// 2 MiB: hugetlbfs memory (`huge_pages: "2M"` in Firecracker).
    Huge,
}

impl PageSize {
    /// The smallest page in bytes. The length of a template is a multiple of it.
    pub const SMALLEST: u64 = 4096;

    /// Returns the page size of `bytes` bytes. `None` if pagecast does not serve it.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            4096 => Some(Self::Small),
            0x20_0000 => Some(Self::Huge),
            _ => None,
        }
    }

    /// Returns the size in bytes, a power of two.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 4096,
            Self::Huge => 0x20_0000,
        }
    }

    /// Returns the size in bytes, for indexing into our own memory.
    pub const fn as_usize(self) -> usize {
        match self {
            Self::Small => 4096,
            Self::Huge => 0x20_0000,
        }
    }

    /// Returns the size as a length.
    pub const fn len(self) -> ByteLen {
        ByteLen::new(self.bytes())
    }

    /// Returns `true` if `value` is a multiple of this page size.
    pub const fn is_aligned(self, value: u64) -> bool {
        value.is_multiple_of(self.bytes())
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "4 KiB",
            Self::Huge => "2 MiB",
        })
    }
}

/// The number of a page within its region, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(usize);

impl PageIndex {
    /// Creates page number `index`.
    pub const fn new(index: usize) -> Self {
        Self(index)
    }

    /// Returns the number.
    pub const fn get(self) -> usize {
        self.0
    }
}
