//! The part of a working set that one fork gets ahead of its faults, and the pages held out to measure the set.

use std::sync::Arc;

use super::WorkingSet;
use crate::page::{PageIndex, PageSize};
use crate::page_set::PageSet;
use crate::template::run::{Run, TemplateOffset};

/// One page in this many of the working set is held out: it is installed only by its fault. The kernel does not tell
/// which installed pages are used, so the held-out pages are the sample. For a working set of 64 MiB, they make about
/// 64 faults.
const HOLD_OUT: u64 = 256;

/// The prefault of one fork with a working set.
#[derive(Debug)]
pub struct PrefaultPlan {
    set: Arc<WorkingSet>,
    /// Small pages of the template.
    members: PageSet,
    held_out: PageSet,
    held_out_count: u64,
}

/// The role of a page in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planned {
    /// The page is not in the working set.
    No,
    /// The page is to be installed ahead of its fault.
    Ahead,
    /// The page is in the working set, but left to its fault.
    HeldOut,
}

impl PrefaultPlan {
    /// Creates the plan for one fork. `salt` decides which pages are held out; with `None`, none is.
    pub fn new(set: Arc<WorkingSet>, salt: Option<u64>) -> Self {
        let pages = usize::try_from(set.template().get() / PageSize::SMALLEST).unwrap_or(usize::MAX);
        let mut members = PageSet::new(pages);
        let mut held_out = PageSet::new(pages);
        let mut held_out_count = 0;
        for run in set.runs() {
            let first = page_at(run.at);
            let count = run.len.get() / PageSize::SMALLEST;
            members.insert_run(first, usize::try_from(count).unwrap_or(0));
            let Some(salt) = salt else { continue };
            for page in first.get() as u64..first.get() as u64 + count {
                if is_chosen(page, salt) {
                    held_out.insert(page_at(TemplateOffset::new(page * PageSize::SMALLEST)));
                    held_out_count += 1;
                }
            }
        }
        Self {
            set,
            members,
            held_out,
            held_out_count,
        }
    }

    /// The working set, in the order in which to install it. It includes the held-out pages, which must be skipped.
    pub fn runs(&self) -> &[Run] {
        self.set.runs()
    }

    /// The number of small pages in the working set, held-out ones included.
    pub fn pages(&self) -> u64 {
        self.set.size().get() / PageSize::SMALLEST
    }

    /// The number of small pages that are held out.
    pub fn held_out(&self) -> u64 {
        self.held_out_count
    }

    /// The role of the small page at `at`.
    pub fn planned(&self, at: TemplateOffset) -> Planned {
        let page = page_at(at);
        if self.held_out.contains(page) {
            Planned::HeldOut
        } else if self.members.contains(page) {
            Planned::Ahead
        } else {
            Planned::No
        }
    }

    /// The number of bytes, of `len` bytes at `at`, before the first page that is held out.
    pub(crate) fn until_held_out(&self, at: TemplateOffset, len: u64) -> u64 {
        let first = page_at(at);
        let end = page_at(TemplateOffset::new(at.get() + len));
        match self.held_out.first_of(first..end) {
            Some(page) => (page.get() - first.get()) as u64 * PageSize::SMALLEST,
            None => len,
        }
    }
}

fn page_at(at: TemplateOffset) -> PageIndex {
    PageIndex::new(usize::try_from(at.get() / PageSize::SMALLEST).unwrap_or(usize::MAX))
}

/// A cheap hash (the finaliser of splitmix64), so that the choice does not depend on the content of pages.
fn is_chosen(page: u64, salt: u64) -> bool {
    let mut mixed = page ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)).is_multiple_of(HOLD_OUT)
}

#[cfg(test)]
mod tests {
    use pagecast_uffd::ByteLen;

    use super::*;
    use crate::template::Recording;

    const PAGE: u64 = PageSize::SMALLEST;

    fn set(pages: impl Iterator<Item = u64>) -> Arc<WorkingSet> {
        let mut recording = Recording::new(ByteLen::new(100_000 * PAGE));
        for page in pages {
            recording.push(TemplateOffset::new(page * PAGE));
        }
        Arc::new(WorkingSet::of(&recording))
    }

    #[test]
    fn about_one_page_of_256_is_held_out_and_others_for_each_fork() {
        let set = set(0..65_536);
        let plans = [1, 2].map(|salt| PrefaultPlan::new(Arc::clone(&set), Some(salt)));
        let held_out = |plan: &PrefaultPlan| {
            let pages = (0..100_000).map(|page| TemplateOffset::new(page * PAGE));
            pages
                .filter(|at| plan.planned(*at) == Planned::HeldOut)
                .collect::<Vec<_>>()
        };
        let [one, other] = plans.each_ref().map(held_out);
        for (plan, pages) in plans.iter().zip([&one, &other]) {
            assert!((128..512).contains(&pages.len()), "{}", pages.len());
            assert_eq!(plan.held_out(), pages.len() as u64);
        }
        assert_ne!(one, other);
        assert_eq!(PrefaultPlan::new(set, None).held_out(), 0);
    }

    #[test]
    fn runs_end_where_a_page_is_held_out() {
        let plan = PrefaultPlan::new(set(0..65_536), Some(3));
        let first = (0..65_536).map(|page| TemplateOffset::new(page * PAGE));
        let first = first.clone().find(|at| plan.planned(*at) == Planned::HeldOut).unwrap();
        assert_eq!(plan.until_held_out(TemplateOffset::new(0), 1 << 30), first.get());
        assert_eq!(plan.until_held_out(TemplateOffset::new(0), first.get()), first.get());
        assert_eq!(plan.until_held_out(first, PAGE), 0);
        let page = |page: u64| plan.planned(TemplateOffset::new(page * PAGE));
        assert_eq!((page(65_535 + 1), page(99_999)), (Planned::No, Planned::No));
    }
}
