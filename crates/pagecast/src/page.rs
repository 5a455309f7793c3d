//! Pages: their sizes and their numbers.

use std::fmt;

use pagecast_uffd::ByteLen;

/// The size of a guest's pages, which is also the unit in which they are installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB: ordinary anonymous memory.
    Small,
    /// 2 MiB: hugetlbfs memory (`huge_pages: "2M"` in Firecracker).
    Huge,
}

impl PageSize {
    /// The smallest page, in bytes. Templates are whole numbers of these.
    pub const SMALLEST: u64 = 4096;

    /// The page size of so many bytes, if pagecast serves it.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            4096 => Some(Self::Small),
            0x20_0000 => Some(Self::Huge),
            _ => None,
        }
    }

    /// In bytes: a power of two.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 4096,
            Self::Huge => 0x20_0000,
        }
    }

    /// In bytes, for indexing into memory of ours.
    pub const fn as_usize(self) -> usize {
        match self {
            Self::Small => 4096,
            Self::Huge => 0x20_0000,
        }
    }

    /// As a length.
    pub const fn len(self) -> ByteLen {
        ByteLen::new(self.bytes())
    }

    /// Whether `value` is a multiple of this page size.
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
    /// Page number `index`.
    pub const fn new(index: usize) -> Self {
        Self(index)
    }

    /// The number.
    pub const fn get(self) -> usize {
        self.0
    }
}
