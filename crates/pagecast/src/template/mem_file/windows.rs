//! The parts of a mapped mem-file that single pages are copied straight from.
//!
//! A copy from the mapping is the fastest answer to a fault. But only pages in the page cache may be touched there, and
//! mapped pages count as resident memory of the server. So the file is divided into *windows*. A window is opened if
//! several faults come there and it is in the page cache. Few windows are open at a time, and all are closed again
//! after a moment.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pagecast_uffd::{ByteLen, MappedFile, MappedRange};

use super::lease_trust::CoarseTime;
use crate::page::PageSize;
use crate::template::TemplateOffset;

/// The size of a window in bytes: what the kernel maps around the first page that is touched (`fault_around_bytes`).
const WINDOW: u64 = 64 << 10;

/// The most windows that are open at once: 4 MiB.
const MOST_OPEN: usize = 64;

/// How long windows stay open, in microseconds. Pages usually stay in the page cache for that long. If one does not, a
/// copy waits for the disk.
const ROUND: u64 = 10_000;

/// The windows of one mem-file. Shared by all threads without a lock: for a moment, the count of open windows may be
/// off by one.
#[derive(Debug)]
pub(super) struct Windows {
    /// The whole file. A separate mapping, so that closing the windows releases nothing else.
    file: MappedFile,
    /// The beginning of this round, as [`CoarseTime::micros`].
    begun: AtomicU64,
    opened: AtomicUsize,
    /// A bit for each window: a fault came there in this round.
    touched: Box<[AtomicU64]>,
    /// A bit for each window: it was in the page cache in this round.
    open: Box<[AtomicU64]>,
}

impl Windows {
    /// Creates the windows of `file` (`len` bytes), all closed. `None` if the file cannot be mapped.
    pub(super) fn new(file: BorrowedFd<'_>, len: ByteLen) -> Option<Self> {
        let file = MappedFile::new(file, 0, len).ok()?;
        // If the page cache has pages of 2 MiB, a touch would map 2 MiB. A kernel without such pages refuses this.
        let _ = file.prefer_small();
        let words = || {
            let windows = len.get().div_ceil(WINDOW);
            (0..windows.div_ceil(u64::BITS.into()))
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        Some(Self {
            file,
            begun: AtomicU64::new(0),
            opened: AtomicUsize::new(0),
            touched: words(),
            open: words(),
        })
    }

    /// The small page at `at`. `None` if its window is closed. Called for each fault.
    pub(super) fn page(&self, at: TemplateOffset, now: CoarseTime) -> Option<MappedRange<'_>> {
        let is_open = self.is_open(at, now);
        is_open
            .then(|| self.file.range(at.get(), PageSize::Small.len()))
            .flatten()
    }

    fn is_open(&self, at: TemplateOffset, now: CoarseTime) -> bool {
        let window = at.get() / WINDOW;
        let bit = 1 << (window % u64::from(u64::BITS));
        let word = usize::try_from(window / u64::from(u64::BITS)).unwrap_or(usize::MAX);
        let (Some(open), Some(touched)) = (self.open.get(word), self.touched.get(word)) else {
            return false;
        };
        let begun = self.begun.load(Ordering::Relaxed);
        if now.micros().saturating_sub(begun) >= ROUND {
            self.next_round(begun, now);
        }
        if open.load(Ordering::Relaxed) & bit != 0 {
            return true;
        }
        // A single fault in a window is answered faster without opening it, which costs as much as reading three pages.
        let is_first = touched.fetch_or(bit, Ordering::Relaxed) & bit == 0;
        if is_first || self.opened.load(Ordering::Relaxed) >= MOST_OPEN {
            return false;
        }
        let start = window * WINDOW;
        let len = WINDOW.min(self.file.len().get().saturating_sub(start));
        let window = self.file.range(start, ByteLen::new(len));
        if !window.is_some_and(|window| window.is_resident()) {
            return false;
        }
        // In this order: a thread that closes the windows and misses this one leaves it open, and counted for the next.
        open.fetch_or(bit, Ordering::Relaxed);
        self.opened.fetch_add(1, Ordering::Release);
        true
    }

    /// Closes all windows. Runs on the first thread that finds the round over.
    #[cold]
    fn next_round(&self, begun: u64, now: CoarseTime) {
        let won = self
            .begun
            .compare_exchange(begun, now.micros(), Ordering::Relaxed, Ordering::Relaxed);
        if won.is_ok() {
            self.close();
        }
    }

    /// Closes all windows, if any is open.
    pub(super) fn close_all(&self) {
        if self.opened.load(Ordering::Relaxed) > 0 {
            self.close();
        }
    }

    fn close(&self) {
        for word in &self.touched {
            word.store(0, Ordering::Relaxed);
        }
        if self.opened.swap(0, Ordering::Acquire) > 0 {
            for word in &self.open {
                word.store(0, Ordering::Relaxed);
            }
            self.file.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    /// Creates a file of `windows` windows and one page, in the page cache.
    fn file(windows: u64) -> (File, ByteLen) {
        let len = windows * WINDOW + PageSize::SMALLEST;
        let file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &file, &vec![7; usize::try_from(len).unwrap()]).unwrap();
        (file, ByteLen::new(len))
    }

    fn windows(file: &File, len: ByteLen) -> Windows {
        Windows::new(file.as_fd(), len).unwrap()
    }

    fn offset(window: u64, page: u64) -> TemplateOffset {
        TemplateOffset::new(window * WINDOW + page * PageSize::SMALLEST)
    }

    #[test]
    fn a_window_is_open_from_its_second_fault_to_the_end_of_the_round() {
        let (file, len) = file(3);
        let windows = windows(&file, len);
        let at = |micros| CoarseTime::from_micros(ROUND + micros);
        let open = |window, page, micros| windows.page(offset(window, page), at(micros)).is_some();
        assert!(!open(1, 0, 0));
        assert!(open(1, 15, 0));
        assert!(open(1, 0, ROUND - 1));
        assert!(!open(0, 0, 0) && !open(2, 0, 0), "others are not");
        // The last one is shorter.
        assert!(!open(3, 0, 0) && open(3, 0, 0));
        assert!(!open(4, 0, 0) && !open(4, 0, 0), "beyond the file");
        assert!(!open(1, 0, ROUND));
        assert!(open(1, 0, ROUND));
    }

    #[test]
    fn only_so_many_are_open_at_a_time() {
        let most = MOST_OPEN as u64;
        let (file, len) = file(most + 2);
        let windows = windows(&file, len);
        let now = CoarseTime::from_micros(ROUND);
        for window in 0..most {
            assert!(windows.page(offset(window, 0), now).is_none());
            let page = windows.page(offset(window, 1), now).unwrap();
            assert_eq!(page.len(), PageSize::Small.len());
        }
        for _ in 0..3 {
            assert!(windows.page(offset(most, 0), now).is_none());
        }
        assert!(windows.page(offset(0, 3), now).is_some());
        let later = CoarseTime::from_micros(2 * ROUND);
        assert!(windows.page(offset(most, 0), later).is_none());
        assert!(windows.page(offset(most, 0), later).is_some());
        windows.close_all();
        assert!(windows.page(offset(most, 0), later).is_none());
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_not_opened() {
        let (file, len) = file(2);
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let windows = windows(&file, len);
        if windows.file.range(0, PageSize::Small.len()).unwrap().is_resident() {
            return pagecast_testkit::skip::skip("a file system that lets go of what is in the page cache");
        }
        let now = CoarseTime::from_micros(ROUND);
        for _ in 0..3 {
            assert!(windows.page(offset(1, 0), now).is_none());
        }
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut vec![0; 64 << 10], WINDOW).unwrap();
        assert!(windows.page(offset(1, 0), now).is_some());
    }
}
