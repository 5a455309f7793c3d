//! The state of each page of a region.

use crate::page::PageIndex;
use crate::page_set::PageSet;

/// The states of a region's pages.
///
/// | state | a fault there gets |
/// | --- | --- |
/// | absent | the template's bytes |
/// | installed | a wake: the page is there |
/// | removed | zeros, for ever: even an installed page may be given back again before its event is read |
///
/// Removed is final. A page filled with zeros after its removal can be dropped by the very `madvise` whose `Remove` was
/// just read: the kernel drops the pages only after its event is read. So only an install attempt tells whether the
/// page is there.
#[derive(Debug)]
pub(crate) struct PageStates {
    installed: PageSet,
    /// Created with the first removal; most forks never have one.
    removed: Option<PageSet>,
    /// Pages whose fault could not be answered at once. Another fault of the same page adds nothing: the answer to the
    /// first wakes all threads that wait there. Without this, a thread hit by signals could fill our queues. In most
    /// forks this memory is never written to, and costs nothing.
    waiting: PageSet,
    pages: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    Absent,
    Installed,
    Removed,
}

impl PageStates {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            installed: PageSet::new(pages),
            removed: None,
            waiting: PageSet::new(pages),
            pages,
        }
    }

    pub(crate) fn get(&self, page: PageIndex) -> PageState {
        if self.removed.as_ref().is_some_and(|removed| removed.contains(page)) {
            PageState::Removed
        } else if self.installed.contains(page) {
            PageState::Installed
        } else {
            PageState::Absent
        }
    }

    pub(crate) fn set_installed(&mut self, first: PageIndex, count: usize) {
        self.installed.insert_run(first, count);
    }

    pub(crate) fn set_removed(&mut self, first: PageIndex, count: usize) {
        self.removed
            .get_or_insert_with(|| PageSet::new(self.pages))
            .insert_run(first, count);
        self.installed.remove_run(first, count);
    }

    /// Notes that a fault of `page` waits for its answer.
    pub(crate) fn set_waiting(&mut self, page: PageIndex) {
        self.waiting.insert(page);
    }

    pub(crate) fn clear_waiting(&mut self, page: PageIndex) {
        self.waiting.remove(page);
    }

    /// Returns `true` if a fault of `page` waits for its answer.
    pub(crate) fn is_waiting(&self, page: PageIndex) -> bool {
        self.waiting.contains(page)
    }

    /// The next run of absent pages at or after `from`, cut at `most` pages.
    pub(crate) fn next_absent(&self, from: PageIndex, most: usize) -> Option<(PageIndex, usize)> {
        self.installed.next_run_outside(self.removed.as_ref(), from, most)
    }

    /// Returns `true` if `page` is absent.
    pub(crate) fn is_absent(&self, page: PageIndex) -> bool {
        page.get() < self.pages && self.get(page) == PageState::Absent
    }

    /// Returns `true` if a fault of one of `count` pages at `first` waits for its answer.
    pub(crate) fn any_waiting(&self, first: PageIndex, count: usize) -> bool {
        let end = PageIndex::new(first.get() + count);
        self.waiting.first_of(first..end).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_is_final_and_never_absent() {
        let mut states = PageStates::new(8);
        states.set_installed(PageIndex::new(2), 1);
        states.set_removed(PageIndex::new(2), 2);
        states.set_installed(PageIndex::new(3), 1);
        assert_eq!(states.get(PageIndex::new(2)), PageState::Removed);
        assert_eq!(states.get(PageIndex::new(3)), PageState::Removed);
        assert_eq!(states.next_absent(PageIndex::new(0), 8), Some((PageIndex::new(0), 2)));
        assert_eq!(states.next_absent(PageIndex::new(2), 8), Some((PageIndex::new(4), 4)));
    }

    #[test]
    fn a_page_waits_until_its_fault_is_answered() {
        let mut states = PageStates::new(3);
        let page = PageIndex::new(1);
        assert!(!states.is_waiting(page) && !states.any_waiting(PageIndex::new(0), 3));
        states.set_waiting(page);
        assert!(states.is_waiting(page) && states.any_waiting(PageIndex::new(0), 3));
        assert!(!states.any_waiting(PageIndex::new(2), 1));
        states.clear_waiting(page);
        assert!(!states.is_waiting(page) && !states.any_waiting(PageIndex::new(0), 3));
    }
}
