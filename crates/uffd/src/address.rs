//! Addresses, lengths and ranges in the address space of a VMM.
//!
//! They are numbers of *another* process, never pointers of ours: nothing here can be dereferenced.

use std::fmt;

/// A virtual address in the VMM's address space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddr(u64);

impl HostAddr {
    /// The address `value`.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The address as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `len` bytes further on, or `None` where that is past the end of the address space.
    pub const fn checked_add(self, len: ByteLen) -> Option<Self> {
        match self.0.checked_add(len.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// How many bytes `self` lies beyond `earlier`, or `None` where it lies before it.
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
    /// No bytes at all.
    pub const ZERO: Self = Self(0);

    /// A length of `bytes`.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The length of something in memory.
    pub const fn of_slice(slice: &[u8]) -> Self {
        // A slice is at most `isize::MAX` bytes long.
        Self(slice.len() as u64)
    }

    /// The length in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether it is nothing.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The sum of two lengths, or `None` on overflow.
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

/// A range of a VMM's address space: never empty, and its end is an address too.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostRange {
    start: HostAddr,
    len: ByteLen,
}

impl HostRange {
    /// The range of `len` bytes from `start`, or `None` where it is empty or runs past the end of the address space.
    pub const fn new(start: HostAddr, len: ByteLen) -> Option<Self> {
        if len.is_zero() || start.checked_add(len).is_none() {
            return None;
        }
        Some(Self { start, len })
    }

    /// The range from `start` up to, but without, `end`; `None` where it is empty.
    pub const fn between(start: HostAddr, end: HostAddr) -> Option<Self> {
        match end.checked_offset_from(start) {
            Some(len) => Self::new(start, len),
            None => None,
        }
    }

    /// Its first address.
    pub const fn start(self) -> HostAddr {
        self.start
    }

    /// Its length in bytes, never zero.
    pub const fn len(self) -> ByteLen {
        self.len
    }

    /// Always `false`; here because a `len` without it surprises.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// The first address after it.
    pub const fn end(self) -> HostAddr {
        // `new` saw that this does not overflow.
        HostAddr(self.start.0 + self.len.0)
    }

    /// Whether `addr` lies inside.
    pub const fn contains(self, addr: HostAddr) -> bool {
        self.start.0 <= addr.0 && addr.0 < self.end().0
    }

    /// What both ranges cover, if anything.
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
