//! Runs of zeros that the kernel can fill by itself.

use pagecast_uffd::HostRange;

use super::region::RegionMap;
use super::step::PageRef;
use super::tracked_region::TrackedRegion;
use crate::page::{PageIndex, PageSize};
use crate::template::ZeroRuns;

/// A range of a fork that can be unregistered: its pages are zeros in the template, and absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroRange {
    pub(super) at: PageRef,
    /// The number of pages.
    pub(crate) pages: usize,
    /// The address range in the VMM.
    pub(crate) memory: HostRange,
}

/// The runs of zeros of a fork to give back.
#[derive(Debug, Default)]
pub(super) struct GiveBack {
    runs: ZeroRuns,
    /// The number of the next run.
    next: usize,
    /// How many pieces of that run were examined: one for each region that holds a part of it.
    pieces: usize,
}

impl GiveBack {
    /// Gives back these runs.
    pub(super) fn new(runs: ZeroRuns) -> Self {
        Self {
            runs,
            next: 0,
            pieces: 0,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.runs.get(self.next).is_none()
    }

    /// The next range; each is returned once. Of each piece, this is the first absent range that is long enough: pages
    /// installed or removed by now are left out. Skips a range where a fault waits for its answer. Skips hugetlbfs:
    /// there, a page that the kernel cannot fill kills the VMM, and one that we cannot copy does not.
    pub(super) fn next(&mut self, regions: &RegionMap<TrackedRegion>) -> Option<ZeroRange> {
        while let Some(run) = self.runs.get(self.next) {
            let Some((index, page, pages)) = regions.pages_of_template(run.at, run.len).nth(self.pieces) else {
                self.next += 1;
                self.pieces = 0;
                continue;
            };
            self.pieces += 1;
            let Some(TrackedRegion { region, states, .. }) = regions.get(index) else {
                continue;
            };
            if region.page_size() != PageSize::Small {
                continue;
            }
            let end = page.get() + pages;
            let mut from = page;
            while let Some((first, pages)) = states
                .next_absent(from, end.saturating_sub(from.get()))
                .filter(|(first, _)| first.get() < end)
            {
                let pages = pages.min(end - first.get());
                if pages >= self.runs.shortest() && !states.any_waiting(first, pages) {
                    let at = PageRef {
                        region: index,
                        page: first,
                    };
                    return Some(ZeroRange {
                        at,
                        pages,
                        memory: region.range_of(first, pages),
                    });
                }
                from = PageIndex::new(first.get() + pages);
            }
        }
        None
    }
}
