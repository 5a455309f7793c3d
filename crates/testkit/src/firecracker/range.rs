//! A part of a guest's memory.

use std::fmt;

/// A range of guest-physical memory, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// Its start; 2 MiB or more, as the guest itself is below.
    pub start_mib: u32,
    /// Its length.
    pub count_mib: u32,
}

impl GuestRange {
    /// The start of the memory under test.
    pub const FIRST_MIB: u32 = 2;

    /// Number of its pages of 4 KiB.
    pub fn pages(self) -> u64 {
        u64::from(self.count_mib) * 256
    }
}

/// The form in the guest's commands.
impl fmt::Display for GuestRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.start_mib, self.count_mib)
    }
}
