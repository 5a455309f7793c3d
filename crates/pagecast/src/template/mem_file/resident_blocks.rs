//! The parts of a mapped mem-file that faults are answered straight from.
//!
//! A copy from the mapping is the fastest answer to a fault. But only pages in the page cache may be touched there, so that no
//! worker waits for a disk. The file is divided into *blocks*. If some faults come to a block, a thread that may wait checks
//! whether all of it is in the page cache, maps it, and opens it. The check is repeated after a while.
//!
//! Mapped pages count as shared memory of the server, and their page tables as its own. So few blocks are mapped at a time, and
//! none if no faults come.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use pagecast_uffd::{ByteLen, MappedFile, MappedRange};

use super::lease_trust::CoarseTime;
use crate::page::PageSize;
use crate::template::{Residency, TemplateOffset, ZeroMap};

/// The size of a block in bytes: what one page table maps.
const BLOCK: u64 = PageSize::Huge.bytes();

/// The most blocks that are mapped at once: 512 MiB, whose page tables take 1 MiB.
const MOST_MAPPED: usize = 256;

/// How many faults come to a block before it is mapped. Mapping it takes as long as a hundred reads of a page save, and all forks of
/// the template gain from it.
const FAULTS: u8 = 8;

/// After this time blocks are checked again, in microseconds. The kernel drops mapped pages from the page cache last. If one is dropped
/// all the same, a copy waits for the disk.
const ROUND: u64 = 1_000_000;

/// The blocks of one mem-file. Shared by all threads without a lock: a block may be closed early, or be checked twice.
#[derive(Debug)]
pub(super) struct ResidentBlocks {
    /// The whole file. A separate mapping, so that closing blocks releases nothing else.
    file: MappedFile,
    /// The beginning of this round, as [`CoarseTime::micros`].
    begun: AtomicU64,
    /// The number of faults that came to each block, up to [`FAULTS`].
    faults: Box<[AtomicU8]>,
    /// A bit for each block: in this round, a caller was asked to map it.
    wanted: Box<[AtomicU64]>,
    /// A bit for each block: in this round, it was in the page cache and mapped.
    open: Box<[AtomicU64]>,
    /// The blocks that were mapped last, each plus one; 0 for none.
    mapped: Box<[AtomicUsize]>,
    /// How many were mapped so far. The next one replaces the oldest.
    count: AtomicUsize,
}

impl ResidentBlocks {
    /// Creates the blocks of `file` (`len` bytes), all closed. `None` if the file cannot be mapped.
    pub(super) fn new(file: BorrowedFd<'_>, len: ByteLen) -> Option<Self> {
        let file = MappedFile::new(file, 0, len).ok()?;
        let blocks = len.get().div_ceil(BLOCK);
        let words = || {
            (0..blocks.div_ceil(u64::BITS.into()))
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        Some(Self {
            file,
            begun: AtomicU64::new(0),
            faults: (0..blocks).map(|_| AtomicU8::new(0)).collect(),
            wanted: words(),
            open: words(),
            mapped: (0..MOST_MAPPED).map(|_| AtomicUsize::new(0)).collect(),
            count: AtomicUsize::new(0),
        })
    }

    /// The `len` bytes at `at`, if their blocks are open. Called for each fault.
    pub(super) fn find(&self, at: TemplateOffset, len: ByteLen, now: CoarseTime) -> Residency<'_> {
        let begun = self.begun.load(Ordering::Relaxed);
        if now.micros().saturating_sub(begun) >= ROUND {
            self.next_round(begun, now);
        }
        let last = at.get().saturating_add(len.get()).saturating_sub(1) / BLOCK;
        for block in at.get() / BLOCK..=last {
            match self.is_open(block) {
                Some(true) => {}
                Some(false) => return Residency::Unknown,
                None => return Residency::MapFirst,
            }
        }
        self.file
            .range(at.get(), len)
            .map_or(Residency::Unknown, Residency::Mapped)
    }

    /// Returns whether a block is open; `None` if it is to be mapped first.
    fn is_open(&self, block: u64) -> Option<bool> {
        let (word, bit) = place(block);
        let (Some(open), Some(wanted)) = (self.open.get(word), self.wanted.get(word)) else {
            return Some(false);
        };
        if open.load(Ordering::Relaxed) & bit != 0 {
            return Some(true);
        }
        let Some(faults) = usize::try_from(block).ok().and_then(|block| self.faults.get(block)) else {
            return Some(false);
        };
        let count = faults.load(Ordering::Relaxed);
        if count < FAULTS {
            // Some may be lost, which only delays the mapping.
            faults.store(count + 1, Ordering::Relaxed);
            return Some(false);
        }
        let is_wanted = wanted.load(Ordering::Relaxed) & bit != 0 || wanted.fetch_or(bit, Ordering::Relaxed) & bit != 0;
        is_wanted.then_some(false)
    }

    /// Maps the block that holds `at` and opens it, if all of it but `zeros`, which nobody copies, is in the page cache.
    pub(super) fn map(&self, at: TemplateOffset, zeros: &ZeroMap) {
        let block = at.get() / BLOCK;
        let (word, bit) = place(block);
        let is_data = |number: usize| {
            let page = TemplateOffset::new(block * BLOCK + number as u64 * PageSize::SMALLEST);
            !zeros.covers(page, PageSize::Small.len())
        };
        if let (Some(range), Some(open)) = (self.block(block), self.open.get(word))
            && range.is_resident_where(is_data)
        {
            let number = usize::try_from(block).map_or(0, |block| block + 1);
            let is_mapped = self
                .mapped
                .iter()
                .any(|mapped| mapped.load(Ordering::Relaxed) == number);
            if !is_mapped {
                self.make_room_for(number);
                range.map_around(is_data);
            }
            open.fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn block(&self, block: u64) -> Option<MappedRange<'_>> {
        let start = block.checked_mul(BLOCK)?;
        let len = BLOCK.min(self.file.len().get().checked_sub(start)?);
        self.file.range(start, ByteLen::new(len))
    }

    /// Closes and unmaps the block that was mapped first, if as many are mapped as may be.
    fn make_room_for(&self, number: usize) {
        let oldest = self.count.fetch_add(1, Ordering::Relaxed) % MOST_MAPPED;
        let oldest = self
            .mapped
            .get(oldest)
            .map_or(0, |place| place.swap(number, Ordering::Relaxed));
        if let Some(oldest) = oldest.checked_sub(1) {
            let (word, bit) = place(oldest as u64);
            if let Some(open) = self.open.get(word) {
                open.fetch_and(!bit, Ordering::Relaxed);
            }
            if let Some(block) = self.block(oldest as u64) {
                block.release();
            }
        }
    }

    /// Closes all blocks, which stay mapped. Runs on the first thread that finds the round over.
    #[cold]
    fn next_round(&self, begun: u64, now: CoarseTime) {
        let won = self
            .begun
            .compare_exchange(begun, now.micros(), Ordering::Relaxed, Ordering::Relaxed);
        if won.is_ok() {
            clear(&self.wanted);
            clear(&self.open);
        }
    }

    /// Closes and unmaps all blocks, if any was mapped.
    pub(super) fn close_all(&self) {
        if self.count.swap(0, Ordering::Relaxed) > 0 {
            for faults in &self.faults {
                faults.store(0, Ordering::Relaxed);
            }
            clear(&self.wanted);
            clear(&self.open);
            for place in &self.mapped {
                place.store(0, Ordering::Relaxed);
            }
            self.file.release();
        }
    }
}

/// The word and the bit of a block.
fn place(block: u64) -> (usize, u64) {
    let bits = u64::from(u64::BITS);
    let word = usize::try_from(block / bits).unwrap_or(usize::MAX);
    (word, 1 << (block % bits))
}

fn clear(words: &[AtomicU64]) {
    for word in words {
        word.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    const PAGE: ByteLen = PageSize::Small.len();

    /// Creates a file of `blocks` blocks and one page, in the page cache.
    fn file(blocks: u64) -> (File, ByteLen) {
        let len = blocks * BLOCK + PageSize::SMALLEST;
        let file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &file, &vec![7; usize::try_from(len).unwrap()]).unwrap();
        (file, ByteLen::new(len))
    }

    fn blocks(file: &File, len: ByteLen) -> ResidentBlocks {
        ResidentBlocks::new(file.as_fd(), len).unwrap()
    }

    fn offset(block: u64, page: u64) -> TemplateOffset {
        TemplateOffset::new(block * BLOCK + page * PageSize::SMALLEST)
    }

    /// Looks for a page, and maps its block if that is asked for. Returns `true` if the page was mapped already.
    fn finds(blocks: &ResidentBlocks, block: u64, page: u64, micros: u64) -> bool {
        let at = offset(block, page);
        match blocks.find(at, PAGE, CoarseTime::from_micros(ROUND + micros)) {
            Residency::Mapped(range) => range.len() == PAGE,
            Residency::MapFirst => {
                blocks.map(at, &ZeroMap::new(blocks.file.len()));
                false
            }
            Residency::Unknown => false,
        }
    }

    #[test]
    fn a_block_is_mapped_after_some_faults_and_checked_in_each_round() {
        let (file, len) = file(3);
        let blocks = blocks(&file, len);
        let finds = |block, page, micros| finds(&blocks, block, page, micros);
        let faults_of = |block, micros| (0..20).take_while(|page| !finds(block, *page, micros)).count();
        let first = usize::from(FAULTS) + 1;
        assert_eq!(faults_of(1, 0), first);
        assert!(finds(1, 511, ROUND - 1));
        assert!(!finds(0, 0, 0) && !finds(2, 0, 0), "others are not");
        // The last one is shorter.
        assert_eq!((0..20).take_while(|_| !finds(3, 0, 0)).count(), first);
        assert_eq!(faults_of(4, 0), 20, "beyond the file");
        assert_eq!(faults_of(1, ROUND), 1, "checked again");
        blocks.close_all();
        assert_eq!(faults_of(1, ROUND), first);
    }

    #[test]
    fn only_one_caller_is_asked_to_map_a_block() {
        let (file, len) = file(1);
        let blocks = blocks(&file, len);
        let find = || blocks.find(offset(0, 0), PAGE, CoarseTime::from_micros(ROUND));
        let asked = (0..20).filter(|_| matches!(find(), Residency::MapFirst));
        assert_eq!(asked.count(), 1);
    }

    #[test]
    fn pages_of_two_blocks_need_both() {
        let (file, len) = file(2);
        let blocks = blocks(&file, len);
        let four = ByteLen::new(4 * PAGE.get());
        let both = || blocks.find(offset(0, 510), four, CoarseTime::from_micros(ROUND));
        for block in [0, 1] {
            assert!(!matches!(both(), Residency::Mapped(_)));
            blocks.map(offset(block, 0), &ZeroMap::new(len));
        }
        assert!(matches!(both(), Residency::Mapped(range) if range.len() == four));
    }

    #[test]
    fn the_oldest_block_is_closed_if_too_many_are_mapped() {
        let file = tempfile::tempfile().unwrap();
        let len = ByteLen::new((MOST_MAPPED as u64 + 1) * BLOCK);
        file.set_len(len.get()).unwrap();
        let blocks = blocks(&file, len);
        // All but the first page of each block, which is read into the page cache.
        let zeros = ZeroMap::new(len);
        let map = |block| {
            zeros.set(offset(block, 1), ByteLen::new(BLOCK - PAGE.get()));
            blocks.block(block).unwrap().map_around(|page| page == 0);
            blocks.map(offset(block, 0), &zeros);
        };
        let is_open = |block| {
            let (word, bit) = place(block);
            blocks.open[word].load(Ordering::Relaxed) & bit != 0
        };
        (0..MOST_MAPPED as u64).for_each(map);
        assert!(is_open(0) && is_open(1));
        map(MOST_MAPPED as u64);
        assert!(!is_open(0) && is_open(1) && is_open(MOST_MAPPED as u64));
    }

    #[test]
    fn zeros_need_not_be_in_the_page_cache() {
        let file = tempfile::tempfile().unwrap();
        let len = ByteLen::new(BLOCK);
        file.set_len(len.get()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 5 * PAGE.get()).unwrap();
        let blocks = blocks(&file, len);
        let find = |page| blocks.find(offset(0, page), PAGE, CoarseTime::from_micros(ROUND));
        let zeros = ZeroMap::new(len);
        zeros.set(offset(0, 0), ByteLen::new(5 * PAGE.get()));
        zeros.set(offset(0, 6), len);
        assert!(!matches!(find(5), Residency::Mapped(_)));
        blocks.map(offset(0, 5), &zeros);
        assert!(matches!(find(5), Residency::Mapped(_)));
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_not_mapped() {
        let (file, len) = file(2);
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let blocks = blocks(&file, len);
        if blocks.file.range(0, PAGE).unwrap().is_resident() {
            return pagecast_testkit::skip::skip("this file system keeps its pages in memory");
        }
        for round in 0..20 {
            assert!(!finds(&blocks, 1, 0, round * ROUND));
        }
        let block = usize::try_from(BLOCK).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut vec![0; block], BLOCK).unwrap();
        assert!(!finds(&blocks, 1, 0, 20 * ROUND) && finds(&blocks, 1, 0, 20 * ROUND));
    }
}
