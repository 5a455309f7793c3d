//! Addresses, lengths and ranges in the address space of a VMM.
//!
//! They belong to *another* process and are never dereferenced here.

use std::fmt;

/// A virtual address in the VMM's address space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddr(u64);

impl HostAddr {
    /// Creates the address `value`.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// Returns the address as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the address `len` bytes further. `None` if it exceeds the address space.
    pub const fn checked_add(self, len: ByteLen) -> Option<Self> {
        match self.0.checked_add(len.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// Returns the number of bytes from `earlier` to `self`. `None` if `self` is lower.
    pub const fn checked_offset_from(self, earlier: Self) -> Option<ByteLen> {
        match self.0.checked_sub(earlier.0) {
            Some(distance) => Some(ByteLen(distance)),
            None => None,
        }
    }
}

impl fmt::Display for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A length in bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteLen(u64);

impl ByteLen {
    /// Zero bytes.
    pub const ZERO: Self = Self(0);

    /// Creates a length of `bytes`.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Returns the length of something in memory.
    pub const fn of_slice(slice: &[u8]) -> Self {
        // A slice is at most `isize::MAX` bytes long.
        Self(slice.len() as u64)
    }

    /// Returns the length in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns `true` if the length is zero.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Returns the sum of two lengths. `None` on overflow.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl fmt::Display for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

impl fmt::Debug for ByteLen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A range of a VMM's address space. It is never empty, and its end is an address, too.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostRange {
    start: HostAddr,
    len: ByteLen,
}

impl HostRange {
    /// Creates the range of `len` bytes from `start`. `None` if it is empty or exceeds the address space.
    pub const fn new(start: HostAddr, len: ByteLen) -> Option<Self> {
        if len.is_zero() || start.checked_add(len).is_none() {
            return None;
        }
        Some(Self { start, len })
    }

    /// Creates the range from `start` to `end`, without `end`. `None` if it is empty.
    pub const fn between(start: HostAddr, end: HostAddr) -> Option<Self> {
        match end.checked_offset_from(start) {
            Some(len) => Self::new(start, len),
            None => None,
        }
    }

    /// Returns the first address.
    pub const fn start(self) -> HostAddr {
        self.start
    }

    /// Returns the length in bytes, never zero.
    pub const fn len(self) -> ByteLen {
        self.len
    }

    /// Returns `false`. It is here because clippy wants it beside `len`.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Returns the first address after the range.
    pub const fn end(self) -> HostAddr {
        // `new` has checked that this does not overflow.
        HostAddr(self.start.0 + self.len.0)
    }

    /// Returns `true` if `addr` is in the range.
    pub const fn contains(self, addr: HostAddr) -> bool {
        self.start.0 <= addr.0 && addr.0 < self.end().0
    }

    /// Returns the intersection of both ranges. `None` if they share no address.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }
}

impl fmt::Display for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

impl fmt::Debug for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> Option<HostRange> {
        HostRange::new(HostAddr::new(start), ByteLen::new(len))
    }

    #[test]
    fn empty_and_overflowing_ranges_do_not_exist() {
        assert_eq!(range(4096, 0), None);
        assert_eq!(range(u64::MAX - 4095, 4096), None);
        assert!(range(u64::MAX - 4095, 4095).is_some());
    }

    #[test]
    fn intersection_is_what_both_cover() {
        let a = range(0x1000, 0x3000).unwrap();
        let b = range(0x2000, 0x9000).unwrap();
        assert_eq!(a.intersection(b), range(0x2000, 0x2000));
        assert_eq!(a.intersection(range(0x4000, 1).unwrap()), None);
    }

    #[test]
    fn the_end_is_outside() {
        let a = range(0x1000, 0x1000).unwrap();
        assert!(a.contains(HostAddr::new(0x1fff)));
        assert!(!a.contains(HostAddr::new(0x2000)));
    }
}
