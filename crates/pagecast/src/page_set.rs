//! A set of pages of one region, or of one template.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::Range;

use memmap2::MmapMut;

use crate::page::PageIndex;

const BITS: usize = u64::BITS as usize;

/// A set of pages, a bit each, of a region or template of known length.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Words,
    pages: usize,
}

/// Zeroed memory, from a source that depends on its size.
#[derive(Debug)]
enum Words {
    /// From the allocator: a VMM may have thousands of small regions, which must not cost a page each.
    Small(Box<[u64]>),
    /// A mapping of its own: unwritten pages take no memory, and all of it is unmapped at the end. The allocator would
    /// zero sets of a few dozen KiB by writing, and keep the memory of ended forks.
    Large(MmapMut),
}

/// The smallest set that is mapped, in words: a page of memory.
const LARGE: usize = 4096 / size_of::<u64>();

impl Words {
    fn zeroed(count: usize) -> Self {
        if count < LARGE {
            return Self::Small(vec![0; count].into());
        }
        Self::mapped(count)
    }

    fn mapped(count: usize) -> Self {
        let layout = Layout::array::<u64>(count).expect("a bit a page of an address space");
        let words = MmapMut::map_anon(layout.size()).unwrap_or_else(|_| handle_alloc_error(layout));
        // Otherwise the first bit would take 2 MiB, if sets are neighbours. An error means that the kernel has no such
        // pages.
        #[cfg(target_os = "linux")]
        let _ = words.advise(memmap2::Advice::NoHugePage);
        Self::Large(words)
    }
}

impl PageSet {
    /// Creates the empty set of a region of `pages` pages.
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            words: Words::zeroed(pages.div_ceil(BITS)),
            pages,
        }
    }

    fn words(&self) -> &[u64] {
        match &self.words {
            Words::Small(words) => words,
            Words::Large(words) => bytemuck::cast_slice(words),
        }
    }

    fn words_mut(&mut self) -> &mut [u64] {
        match &mut self.words {
            Words::Small(words) => words,
            Words::Large(words) => bytemuck::cast_slice_mut(words),
        }
    }

    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        self.words()
            .get(page.get() / BITS)
            .is_some_and(|word| word >> (page.get() % BITS) & 1 == 1)
    }

    /// Adds a page. Returns `true` if it was not in the set.
    pub(crate) fn insert(&mut self, page: PageIndex) -> bool {
        let Some(word) = self.words_mut().get_mut(page.get() / BITS) else {
            return false;
        };
        let bit = 1 << (page.get() % BITS);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    pub(crate) fn remove(&mut self, page: PageIndex) {
        if let Some(word) = self.words_mut().get_mut(page.get() / BITS) {
            *word &= !(1 << (page.get() % BITS));
        }
    }

    /// Adds `count` pages from `first` on.
    pub(crate) fn insert_run(&mut self, first: PageIndex, count: usize) {
        self.change_run(first, count, |word, mask| *word |= mask);
    }

    /// Removes `count` pages from `first` on.
    pub(crate) fn remove_run(&mut self, first: PageIndex, count: usize) {
        self.change_run(first, count, |word, mask| *word &= !mask);
    }

    fn change_run(&mut self, first: PageIndex, count: usize, change: impl Fn(&mut u64, u64)) {
        let mut at = first.get();
        let end = at.saturating_add(count).min(self.pages);
        while at < end {
            let bit = at % BITS;
            let here = (BITS - bit).min(end - at);
            let mask = (u64::MAX >> (BITS - here)) << bit;
            if let Some(word) = self.words_mut().get_mut(at / BITS) {
                change(word, mask);
            }
            at += here;
        }
    }

    /// Returns the first run of pages, at or after `from`, that are neither in this set nor in `other` (of the same
    /// region), at most `most` pages long, as first page and count.
    pub(crate) fn next_run_outside(
        &self,
        other: Option<&Self>,
        from: PageIndex,
        most: usize,
    ) -> Option<(PageIndex, usize)> {
        let (own, other) = (self.words(), other.map(Self::words));
        let inside = |word: usize| {
            let own = own.get(word).copied().unwrap_or(u64::MAX);
            own | other.and_then(|other| other.get(word)).copied().unwrap_or(0)
        };
        let first = seek(from.get()..self.pages, |word| !inside(word))?;
        let until = first.saturating_add(most).min(self.pages);
        let end = seek(first..until, inside).unwrap_or(until);
        Some((PageIndex::new(first), end - first))
    }

    /// Returns the first of these pages that is in the set.
    pub(crate) fn first_of(&self, pages: Range<PageIndex>) -> Option<PageIndex> {
        let words = self.words();
        let word = |word: usize| words.get(word).copied().unwrap_or(0);
        let end = pages.end.get().min(self.pages);
        seek(pages.start.get()..end, word).map(PageIndex::new)
    }
}

/// Returns the first of these pages whose bit is set in `word_at`.
fn seek(pages: Range<usize>, word_at: impl Fn(usize) -> u64) -> Option<usize> {
    let mut index = pages.start / BITS;
    let mut mask = u64::MAX << (pages.start % BITS);
    while index * BITS < pages.end {
        let word = word_at(index) & mask;
        if word != 0 {
            let page = index * BITS + word.trailing_zeros() as usize;
            return (page < pages.end).then_some(page);
        }
        mask = u64::MAX;
        index += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Change {
        Insert(usize),
        Remove(usize),
        InsertRun(usize, usize),
        RemoveRun(usize, usize),
    }

    fn changes(pages: usize) -> impl Strategy<Value = Vec<Change>> {
        let change = prop_oneof![
            (0..pages).prop_map(Change::Insert),
            (0..pages).prop_map(Change::Remove),
            (0..pages, 0..pages).prop_map(|(first, count)| Change::InsertRun(first, count)),
            (0..pages, 0..pages).prop_map(|(first, count)| Change::RemoveRun(first, count)),
        ];
        proptest::collection::vec(change, 0..20)
    }

    fn apply(mut set: PageSet, changes: &[Change]) -> (PageSet, BTreeSet<usize>) {
        let pages = set.pages;
        let mut model = BTreeSet::new();
        for change in changes {
            match *change {
                Change::Insert(page) => assert_eq!(set.insert(PageIndex::new(page)), model.insert(page)),
                Change::Remove(page) => {
                    set.remove(PageIndex::new(page));
                    model.remove(&page);
                }
                Change::InsertRun(first, count) => {
                    set.insert_run(PageIndex::new(first), count);
                    model.extend(first..(first + count).min(pages));
                }
                Change::RemoveRun(first, count) => {
                    set.remove_run(PageIndex::new(first), count);
                    model.retain(|page| !(first..first + count).contains(page));
                }
            }
        }
        (set, model)
    }

    #[test]
    fn only_large_ones_are_mapped() {
        let is_mapped = |pages| matches!(PageSet::new(pages).words, Words::Large(_));
        assert!(!is_mapped(0) && !is_mapped(1) && !is_mapped(BITS * (LARGE - 1)));
        assert!(is_mapped(BITS * LARGE) && is_mapped(1 << 18));
    }

    proptest! {
        #[test]
        fn it_is_a_set((pages, ours, others, most) in (1..200usize, 1..70usize)
            .prop_flat_map(|(pages, most)| (Just(pages), changes(pages), changes(pages), Just(most)))) {
            let mapped = PageSet { words: Words::mapped(pages.div_ceil(BITS)), pages };
            let (set, model) = apply(mapped, &ours);
            let (other, other_model) = apply(PageSet::new(pages), &others);
            for page in 0..pages {
                prop_assert_eq!(set.contains(PageIndex::new(page)), model.contains(&page));
            }
            for from in 0..=pages {
                let end = from + most;
                let next = set.first_of(PageIndex::new(from)..PageIndex::new(end)).map(PageIndex::get);
                prop_assert_eq!(next, model.range(from..end).next().copied());
                let outside = |page: &usize| !model.contains(page) && !other_model.contains(page);
                let expected = (from..pages).find(outside)
                    .map(|first| (first, (first..pages).take_while(outside).count().min(most)));
                let found = set.next_run_outside(Some(&other), PageIndex::new(from), most)
                    .map(|(first, count)| (first.get(), count));
                prop_assert_eq!(found, expected);
            }
        }
    }
}
