//! Which part of a guest's memory is meant.

use std::fmt;

/// A range of guest-physical memory, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// Where it starts; 2 MiB or more, as the guest itself is below.
    pub start_mib: u32,
    /// How much it is.
    pub count_mib: u32,
}

impl GuestRange {
    /// Where the memory under test starts.
    pub const FIRST_MIB: u32 = 2;

    /// How many pages of 4 KiB it is.
    pub fn pages(self) -> u64 {
        u64::from(self.count_mib) * 256
    }
}

/// As the guest's commands want it.
impl fmt::Display for GuestRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.start_mib, self.count_mib)
    }
}
