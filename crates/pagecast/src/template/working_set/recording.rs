//! The pages that one fork touched, in the order in which it did.

use std::fmt;

use pagecast_uffd::ByteLen;

use crate::page::{PageIndex, PageSize};
use crate::page_set::PageSet;
use crate::template::run::TemplateOffset;

/// The small pages (4 KiB) of a template that one fork touched, each once, in the order of the first touch.
///
/// A recording is made of demand faults, so it lacks pages that were installed before the fork touched them: only a
/// fork without prefault can be recorded. It has no clock: unless it is full, its maker decides when it ends.
///
/// It takes one bit for each page of the template, and 4 bytes for each page that was touched.
pub struct Recording {
    template: ByteLen,
    /// The number of small pages of the template that can be recorded.
    pages: u32,
    seen: PageSet,
    /// Numbers of small pages within the template.
    order: Vec<u32>,
    is_cut_short: bool,
}

impl Recording {
    /// The most pages that are recorded: 512 MiB. Pages that a fork touches after that are no working set any more.
    pub const MOST_PAGES: usize = 1 << 17;

    /// Creates the recording of a fork of a template of `template` bytes. The fork has touched nothing yet.
    pub fn new(template: ByteLen) -> Self {
        // Pages are numbered with 32 bits: past 16 TiB nothing is recorded.
        let pages = u32::try_from(template.get() / PageSize::SMALLEST).unwrap_or(u32::MAX);
        Self {
            template,
            pages,
            seen: PageSet::new(pages as usize),
            order: Vec::new(),
            is_cut_short: false,
        }
    }

    /// Notes that the fork ended before its recording: the rest of its working set is not known.
    pub fn cut_short(&mut self) {
        self.is_cut_short = true;
    }

    /// Returns `true` if the fork ended before its recording.
    pub fn is_cut_short(&self) -> bool {
        self.is_cut_short
    }

    /// Notes that the small page at `at` was touched. Returns `true` if there is room for another one. Ignores a page
    /// that is recorded already, or that the template does not have.
    ///
    /// A larger page is pushed as all its small pages that are not known to be zeros.
    pub fn push(&mut self, at: TemplateOffset) -> bool {
        let room = self.order.len() < Self::MOST_PAGES;
        if room
            && let Ok(page) = u32::try_from(at.get() / PageSize::SMALLEST)
            && page < self.pages
            && self.seen.insert(PageIndex::new(page as usize))
        {
            self.order.push(page);
        }
        self.order.len() < Self::MOST_PAGES
    }

    /// The length of the template in bytes.
    pub fn template(&self) -> ByteLen {
        self.template
    }

    /// The number of small pages that were touched.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Returns `true` if no page was touched.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The small pages in the order in which they were touched.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = TemplateOffset> + '_ {
        self.numbers()
            .map(|page| TemplateOffset::new(u64::from(page) * PageSize::SMALLEST))
    }

    /// The numbers of these pages, in the same order.
    pub(super) fn numbers(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.order.iter().copied()
    }
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording")
            .field("template", &self.template)
            .field("pages", &self.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64) -> TemplateOffset {
        TemplateOffset::new(number * PageSize::SMALLEST)
    }

    #[test]
    fn pages_are_kept_once_in_first_touch_order() {
        let mut recording = Recording::new(ByteLen::new(10 * PageSize::SMALLEST));
        for number in [7, 2, 7, 0, 2] {
            assert!(recording.push(page(number)));
        }
        assert_eq!(recording.pages().collect::<Vec<_>>(), [page(7), page(2), page(0)]);
    }

    #[test]
    fn pages_that_the_template_has_not_are_not_recorded() {
        let mut recording = Recording::new(ByteLen::new(10 * PageSize::SMALLEST));
        for at in [
            page(10),
            page(63),
            page(64),
            page(1 << 40),
            TemplateOffset::new(u64::MAX),
        ] {
            assert!(recording.push(at));
        }
        assert!(recording.is_empty());
    }

    #[test]
    fn a_full_recording_says_so_and_takes_no_more() {
        let pages = Recording::MOST_PAGES as u64;
        let mut recording = Recording::new(ByteLen::new((pages + 1) * PageSize::SMALLEST));
        assert!((0..pages - 1).all(|number| recording.push(page(number))));
        assert!(!recording.push(page(pages - 1)) && !recording.push(page(pages)));
        assert_eq!(recording.len(), Recording::MOST_PAGES);
    }
}
