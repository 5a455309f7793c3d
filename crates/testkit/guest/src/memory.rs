//! The memory under test, and the expected pattern of each page. Runs in ring 3.

use core::iter::StepBy;
use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::cpu::{RAM_GIB, ticks};

pub(crate) const PAGE: usize = 4096;
pub(crate) const PAGES_PER_MIB: usize = (1 << 20) / PAGE;
/// The guest itself is below: its image ends under 2 MiB (see guest.ld).
pub(crate) const FIRST_MIB: usize = 2;

const WORD: usize = 8;
/// Odd, so that the words of a pattern are all different, and far from any small difference of two addresses.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

const PAGES: usize = (RAM_GIB << 30) / PAGE;
/// The pattern that each page must hold. 0, zeros, for a page that was never written, or given back since.
static PATTERNS: [AtomicU8; PAGES] = [const { AtomicU8::new(0) }; PAGES];

/// The content of a page: zeros, or words that depend on their physical address and on the pattern's number. A page
/// with a wrong address, an older pattern, or another fork's pattern is wrong in every word.
#[derive(Clone, Copy)]
pub(crate) struct Pattern(u8);

impl Pattern {
    pub(crate) fn new(number: u8) -> Self {
        Self(number)
    }

    /// The word at the start of a page, and the increment of each following word.
    fn first_and_step(self, page: usize) -> (u64, u64) {
        if self.0 == 0 {
            return (0, 0);
        }
        // Finalizer of splitmix64: numbers that differ by one give unrelated keys.
        let mut key = u64::from(self.0).wrapping_mul(STEP);
        key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        key ^= key >> 31;
        (
            key.wrapping_add(((page * PAGE) as u64).wrapping_mul(STEP)),
            STEP.wrapping_mul(WORD as u64),
        )
    }
}

pub(crate) struct Written {
    pub(crate) pages: usize,
    pub(crate) ticks: u64,
}

pub(crate) struct Verified {
    pub(crate) pages: usize,
    /// FNV-1a of the numbers of the expected patterns.
    pub(crate) patterns: u64,
    /// In words.
    pub(crate) mismatches: u64,
    pub(crate) first_bad: Option<Mismatch>,
    pub(crate) ticks: u64,
}

pub(crate) struct Mismatch {
    pub(crate) address: usize,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

pub(crate) struct Touched {
    pub(crate) pages: usize,
    pub(crate) sum: u64,
    pub(crate) ticks: u64,
}

pub(crate) fn write(pages: Range<usize>, every: usize, pattern: Pattern) -> Written {
    let started = ticks();
    let mut written = 0;
    for page in pages.filter(|page| page.is_multiple_of(every)) {
        let (mut word, step) = pattern.first_and_step(page);
        for address in words_of(page) {
            // SAFETY: the caller checked that the range is RAM beyond the guest's own image; it is identity mapped.
            unsafe { ptr::with_exposed_provenance_mut::<u64>(address).write_volatile(word) };
            word = word.wrapping_add(step);
        }
        PATTERNS[page].store(pattern.0, Ordering::Relaxed);
        written += 1;
    }
    Written {
        pages: written,
        ticks: ticks() - started,
    }
}

/// Notes that these pages were given back: they read as zeros from now on.
pub(crate) fn forget(pages: Range<usize>) {
    for pattern in &PATTERNS[pages] {
        pattern.store(0, Ordering::Relaxed);
    }
}

pub(crate) fn verify(pages: Range<usize>) -> Verified {
    let started = ticks();
    let mut verified = Verified {
        pages: 0,
        patterns: 0xcbf2_9ce4_8422_2325,
        mismatches: 0,
        first_bad: None,
        ticks: 0,
    };
    for page in pages {
        let pattern = Pattern(PATTERNS[page].load(Ordering::Relaxed));
        verified.patterns = (verified.patterns ^ u64::from(pattern.0)).wrapping_mul(0x100_0000_01b3);
        let (mut expected, step) = pattern.first_and_step(page);
        for address in words_of(page) {
            let found = read(address);
            if found != expected {
                verified.mismatches += 1;
                verified.first_bad.get_or_insert(Mismatch {
                    address,
                    expected,
                    found,
                });
            }
            expected = expected.wrapping_add(step);
        }
        verified.pages += 1;
    }
    verified.ticks = ticks() - started;
    verified
}

pub(crate) fn touch(pages: Range<usize>) -> Touched {
    let started = ticks();
    let mut touched = Touched {
        pages: 0,
        sum: 0,
        ticks: 0,
    };
    for page in pages {
        touched.sum = touched.sum.wrapping_add(read(page * PAGE));
        touched.pages += 1;
    }
    touched.ticks = ticks() - started;
    touched
}

fn read(address: usize) -> u64 {
    // SAFETY: as in `write`. Volatile, as the word may have been changed by the host meanwhile.
    unsafe { ptr::with_exposed_provenance::<u64>(address).read_volatile() }
}

fn words_of(page: usize) -> StepBy<Range<usize>> {
    (page * PAGE..(page + 1) * PAGE).step_by(WORD)
}
