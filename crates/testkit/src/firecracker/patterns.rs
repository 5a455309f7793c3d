//! The expected pattern of each page of a guest, from the commands that it got.

use anyhow::{Context as _, Result};

use super::GuestRange;

const PAGES_PER_MIB: usize = 256;

/// The number of the pattern of each page, from guest-physical address 0 on; 0 is zeros.
///
/// The guest keeps the same notes, and checks its memory against them. But they are in that memory: if it reads as
/// zeros, so may the notes, and every page looks right. So the guest sends a digest of its notes, which must match that
/// of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Patterns(Vec<u8>);

impl Patterns {
    pub(crate) fn zeros(mem_mib: u32) -> Self {
        Self(vec![0; mem_mib as usize * PAGES_PER_MIB])
    }

    pub(crate) fn write(&mut self, range: GuestRange, every: u32, pattern: u8) {
        let (start, end) = bounds(range);
        for page in self
            .0
            .iter_mut()
            .take(end)
            .skip(start.next_multiple_of(every as usize))
            .step_by(every as usize)
        {
            *page = pattern;
        }
    }

    /// FNV-1a of the numbers in the range.
    pub(crate) fn digest(&self, range: GuestRange) -> Result<u64> {
        let (start, end) = bounds(range);
        let numbers = self.0.get(start..end).context("range outside the guest's memory")?;
        Ok(numbers.iter().fold(0xcbf2_9ce4_8422_2325, |digest, &number| {
            (digest ^ u64::from(number)).wrapping_mul(0x100_0000_01b3)
        }))
    }
}

fn bounds(range: GuestRange) -> (usize, usize) {
    let start = range.start_mib as usize * PAGES_PER_MIB;
    (start, start + range.count_mib as usize * PAGES_PER_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mib(start_mib: u32, count_mib: u32) -> GuestRange {
        GuestRange { start_mib, count_mib }
    }

    #[test]
    fn every_nth_page_is_counted_from_address_zero() {
        let mut patterns = Patterns::zeros(4);
        patterns.write(mib(2, 1), 7, 3);
        let written: Vec<usize> = (0..4 * PAGES_PER_MIB).filter(|&page| patterns.0[page] == 3).collect();
        let expected: Vec<usize> = (512..768).filter(|page| page % 7 == 0).collect();
        assert_eq!(written, expected);
    }

    #[test]
    fn a_digest_tells_zeros_from_patterns_and_places_apart() -> Result<()> {
        let zeros = Patterns::zeros(4);
        let mut filled = zeros.clone();
        filled.write(mib(2, 1), 1, 1);
        let mut elsewhere = zeros.clone();
        elsewhere.write(mib(3, 1), 1, 1);
        let whole = mib(2, 2);
        assert_ne!(filled.digest(whole)?, zeros.digest(whole)?);
        assert_ne!(filled.digest(whole)?, elsewhere.digest(whole)?);
        assert_eq!(filled.digest(mib(3, 1))?, zeros.digest(mib(3, 1))?);
        Ok(())
    }

    #[test]
    fn a_range_past_the_end_has_no_digest() {
        assert!(Patterns::zeros(4).digest(mib(3, 2)).is_err());
    }

    #[test]
    fn the_digest_is_fnv_1a() -> Result<()> {
        // Hashing nothing gives the offset basis.
        assert_eq!(Patterns::zeros(4).digest(mib(2, 0))?, 0xcbf2_9ce4_8422_2325);
        Ok(())
    }
}
