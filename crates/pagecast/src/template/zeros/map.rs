//! The pages of a template that are known to be zeros.

use std::sync::atomic::{AtomicU64, Ordering};

use pagecast_uffd::ByteLen;

use crate::page::PageSize;
use crate::template::run::{Run, TemplateOffset};

const BITS: u64 = u64::BITS as u64;
const SMALLEST: usize = PageSize::Small.as_usize();

/// A small page of zeros, to compare with.
static ZEROS: [u8; SMALLEST] = [0; SMALLEST];

/// One bit for each small page (4 KiB) of a template, set if the page is known to be zeros. Shared by all threads
/// without a lock. A bit is only ever set, since templates do not change.
#[derive(Debug)]
pub struct ZeroMap {
    words: Box<[AtomicU64]>,
}

impl ZeroMap {
    /// Creates the map of a template of `template` bytes, with nothing known yet.
    pub fn new(template: ByteLen) -> Self {
        let pages = template.get() / PageSize::SMALLEST;
        let words = (0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Self { words }
    }

    /// Notes that the small pages wholly within these bytes are zeros.
    pub fn set(&self, at: TemplateOffset, len: ByteLen) {
        let first = at.get().div_ceil(PageSize::SMALLEST);
        let end = at.get().saturating_add(len.get()) / PageSize::SMALLEST;
        for_each_word(first, end, |word, mask| {
            if let Some(word) = self.words.get(word) {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            true
        });
    }

    /// Returns `true` if all these bytes are known to be zeros.
    pub fn covers(&self, at: TemplateOffset, len: ByteLen) -> bool {
        let first = at.get() / PageSize::SMALLEST;
        let end = at.get().saturating_add(len.get()).div_ceil(PageSize::SMALLEST);
        for_each_word(first, end, |word, mask| {
            self.words
                .get(word)
                .is_some_and(|word| word.load(Ordering::Relaxed) & mask == mask)
        })
    }

    /// All runs of small pages that are known to be zeros, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        let mut at = TemplateOffset::new(0);
        std::iter::from_fn(move || {
            let run = self.next_run(at)?;
            at = TemplateOffset::new(run.at.get() + run.len.get());
            Some(run)
        })
    }

    /// The next run of small pages at or after `from` that are known to be zeros.
    pub fn next_run(&self, from: TemplateOffset) -> Option<Run> {
        self.next_run_where(true, from)
    }

    /// The next run of small pages at or after `from` that are not known to be zeros. The last one may reach past the end
    /// of the template.
    pub(crate) fn next_unknown(&self, from: TemplateOffset) -> Option<Run> {
        self.next_run_where(false, from)
    }

    fn next_run_where(&self, known: bool, from: TemplateOffset) -> Option<Run> {
        let word_at = |index: usize| self.words.get(index).map(|word| word.load(Ordering::Relaxed));
        let wanted = |index: usize| word_at(index).map(|word| if known { word } else { !word });
        let others = |index: usize| wanted(index).map(|word| !word);
        let start = seek(from.get().div_ceil(PageSize::SMALLEST), wanted)?;
        let end = seek(start, others).unwrap_or(self.words.len() as u64 * BITS);
        Some(Run {
            at: TemplateOffset::new(start * PageSize::SMALLEST),
            len: ByteLen::new((end - start) * PageSize::SMALLEST),
        })
    }

    /// The number of bytes that are known to be zeros.
    pub fn known_bytes(&self) -> ByteLen {
        let pages: u64 = self
            .words
            .iter()
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum();
        ByteLen::new(pages * PageSize::SMALLEST)
    }
}

/// The first set bit at or after `from`. `word_at` returns the words; the search ends at its first `None`.
fn seek(from: u64, word_at: impl Fn(usize) -> Option<u64>) -> Option<u64> {
    let mut index = usize::try_from(from / BITS).ok()?;
    let mut word = word_at(index)? & (u64::MAX << (from % BITS));
    while word == 0 {
        index += 1;
        word = word_at(index)?;
    }
    Some(index as u64 * BITS + u64::from(word.trailing_zeros()))
}

#[cfg(target_os = "linux")]
impl ZeroMap {
    /// The bits as bytes. The bit of the first page is the lowest of the first byte.
    pub(in crate::template) fn to_le_bytes(&self) -> Vec<u8> {
        let words = self.words.iter().map(|word| word.load(Ordering::Relaxed).to_le_bytes());
        words.flatten().collect()
    }

    /// Adds the result of [`to_le_bytes`](Self::to_le_bytes) of a map of the same template, which has `pages` small
    /// pages. Returns `false`, and adds nothing, if `bytes` is of a template of another size.
    pub(in crate::template) fn set_le_bytes(&self, bytes: &[u8], pages: u64) -> bool {
        let (words, rest) = bytes.as_chunks();
        let past_the_end =
            |word: &[u8; 8]| !pages.is_multiple_of(BITS) && u64::from_le_bytes(*word) >> (pages % BITS) != 0;
        let fits = rest.is_empty() && words.len() == self.words.len() && !words.last().is_some_and(past_the_end);
        if fits {
            for (word, bits) in self.words.iter().zip(words) {
                word.fetch_or(u64::from_le_bytes(*bits), Ordering::Relaxed);
            }
        }
        fits
    }
}

/// Calls `f` with each word that holds bits `first..end` and the mask of those bits, until it returns `false`.
fn for_each_word(first: u64, end: u64, mut f: impl FnMut(usize, u64) -> bool) -> bool {
    let mut at = first;
    while at < end {
        let bit = at % BITS;
        let here = (BITS - bit).min(end - at);
        let mask = (u64::MAX >> (BITS - here)) << bit;
        let Ok(word) = usize::try_from(at / BITS) else {
            return false;
        };
        if !f(word, mask) {
            return false;
        }
        at += here;
    }
    true
}

/// Measures the longest run of pages at the beginning of `bytes` that are all zeros, or that all are not. Returns
/// whether they are zeros, and how many. `bytes` is at least one page long.
pub(crate) fn leading_zero_pages(bytes: &[u8], page_size: PageSize) -> (bool, usize) {
    let mut pages = bytes.chunks(page_size.as_usize()).map(is_zero);
    let first = pages.next().unwrap_or(true);
    (first, 1 + pages.take_while(|zero| *zero == first).count())
}

/// Returns `true` if all bytes are zeros. Stops at the first small page with another byte; most pages have one early.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(SMALLEST).all(|page| Some(page) == ZEROS.get(..page.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PageSize::SMALLEST;

    fn set(map: &ZeroMap, first: u64, pages: u64) {
        map.set(TemplateOffset::new(first * PAGE), ByteLen::new(pages * PAGE));
    }

    fn covers(map: &ZeroMap, first: u64, pages: u64) -> bool {
        map.covers(TemplateOffset::new(first * PAGE), ByteLen::new(pages * PAGE))
    }

    #[test]
    fn a_page_that_is_a_hole_in_part_is_not_known_to_be_zeros() {
        let map = ZeroMap::new(ByteLen::new(4 * PAGE));
        map.set(TemplateOffset::new(512), ByteLen::new(3 * PAGE));
        assert_eq!(map.known_bytes(), ByteLen::new(2 * PAGE));
        assert!(covers(&map, 1, 2) && !covers(&map, 0, 1) && !covers(&map, 3, 1));
    }

    #[test]
    fn nothing_past_the_end_is_known() {
        let map = ZeroMap::new(ByteLen::new(PAGE));
        set(&map, 0, 1000);
        assert!(!covers(&map, 64, 1));
    }

    #[test]
    fn pages_split_into_runs_of_a_kind() {
        let mut bytes = vec![0; 5 * SMALLEST];
        bytes[2 * SMALLEST + 4095] = 1;
        bytes[3 * SMALLEST] = 1;
        assert_eq!(leading_zero_pages(&bytes, PageSize::Small), (true, 2));
        assert_eq!(leading_zero_pages(&bytes[2 * SMALLEST..], PageSize::Small), (false, 2));
        assert_eq!(leading_zero_pages(&bytes[4 * SMALLEST..], PageSize::Small), (true, 1));
    }

    proptest! {
        #[test]
        fn it_covers_what_was_set(runs in proptest::collection::vec((0..300u64, 0..200u64), 0..6), probe in (0..300u64, 1..150u64)) {
            let map = ZeroMap::new(ByteLen::new(300 * PAGE));
            for &(first, pages) in &runs { set(&map, first, pages.min(300 - first)); }
            let known = |page: u64| runs.iter().any(|(first, pages)| (*first..first + pages).contains(&page)) && page < 300;
            let (first, pages) = probe;
            prop_assert_eq!(covers(&map, first, pages), (first..first + pages).all(known));
            let expected = (first..300).find(|page| known(*page)).map(|start| (start, (start..300).take_while(|page| known(*page)).count() as u64));
            let found = map.next_run(TemplateOffset::new(first * PAGE)).map(|run| (run.at.get() / PAGE, run.len.get() / PAGE));
            prop_assert_eq!(found, expected);
            let unknown = map.next_unknown(TemplateOffset::new(first * PAGE)).map(|run| run.at.get() / PAGE);
            let end = 300_u64.next_multiple_of(BITS);
            prop_assert_eq!(unknown, (first..end).find(|page| !known(*page)));
            // Runs of the two kinds take turns.
            for start in (first..end).filter(|page| !known(*page)) {
                let run = map.next_unknown(TemplateOffset::new(start * PAGE)).unwrap();
                let pages = (start..end).take_while(|page| !known(*page)).count() as u64;
                prop_assert_eq!((run.at.get() / PAGE, run.len.get() / PAGE), (start, pages));
            }
        }
    }
}
