//! Runs of zeros that the kernel can fill by itself.

use pagecast_uffd::HostRange;

use super::page_states::PageStates;
use super::region::RegionMap;
use super::step::PageRef;
use crate::page::{PageIndex, PageSize};
use crate::template::Run;

/// The shortest run that is given back, in pages: 64 KiB. Unregistering takes as long as answering a fault or two, and a
/// shorter run saves few.
const SHORTEST: usize = 16;

/// The most runs of one fork that are given back, the longest ones. Each splits a mapping in two or three; a process may
/// have 65,530 (`vm.max_map_count`), and each takes some 200 bytes of the kernel.
const MOST_RUNS: usize = 512;

/// A range of a fork that can be unregistered: it is zeros in the template, and absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRange {
    pub(super) at: PageRef,
    /// How many pages it has.
    pub pages: usize,
    /// Where it is in the VMM.
    pub memory: HostRange,
}

/// What of a fork is to be given back.
#[derive(Debug, Default)]
pub(super) struct GiveBack {
    /// In pages.
    shortest: usize,
    /// The next one last.
    runs: Vec<ZeroRun>,
}

#[derive(Clone, Copy, Debug)]
struct ZeroRun {
    at: PageRef,
    pages: usize,
}

impl GiveBack {
    /// Of these runs, those that are worth it; of them, if they are many, the longest. On hugetlbfs there are none: there a
    /// page that the kernel cannot fill kills the VMM, and one that we cannot copy does not.
    pub(super) fn new(regions: &RegionMap, zeros: impl IntoIterator<Item = Run>) -> Self {
        Self::bounded(regions, zeros, SHORTEST, MOST_RUNS)
    }

    pub(super) fn bounded(
        regions: &RegionMap,
        zeros: impl IntoIterator<Item = Run>,
        shortest: usize,
        most: usize,
    ) -> Self {
        let mut runs: Vec<ZeroRun> = Vec::new();
        for run in zeros {
            if run.len.get() < shortest as u64 * PageSize::SMALLEST {
                continue;
            }
            for (region, first, pages) in regions.pages_of_template(run.at, run.len) {
                let small = regions
                    .get(region)
                    .is_some_and(|region| region.page_size() == PageSize::Small);
                if small && pages >= shortest {
                    let at = PageRef { region, page: first };
                    runs.push(ZeroRun { at, pages });
                }
            }
        }
        runs.sort_unstable_by_key(|run| run.pages);
        let surplus = runs.len().saturating_sub(most);
        runs.drain(..surplus);
        Self { shortest, runs }
    }

    pub(super) fn is_done(&self) -> bool {
        self.runs.is_empty()
    }

    /// The next range, once. What of a run is installed or removed by now is left out, and so is everything before or
    /// between: one range a run, the first that is still long enough. None where a fault waits for its answer.
    pub(super) fn next(&mut self, regions: &RegionMap, states: &[PageStates]) -> Option<ZeroRange> {
        while let Some(run) = self.runs.pop() {
            if self.runs.is_empty() {
                // A fork lives on for long after its last one, and this room was made for all of them.
                self.runs = Vec::new();
            }
            let PageRef { region: index, page } = run.at;
            let (Some(region), Some(states)) = (regions.get(index), states.get(index.get())) else {
                continue;
            };
            let end = page.get() + run.pages;
            let mut from = page;
            while let Some((first, pages)) = states
                .next_absent(from, usize::MAX)
                .filter(|(first, _)| first.get() < end)
            {
                let pages = pages.min(end - first.get());
                if pages >= self.shortest && !states.any_waiting(first, pages) {
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

#[cfg(test)]
mod tests {
    use pagecast_uffd::{ByteLen, HostAddr};

    use super::*;
    use crate::session::Region;
    use crate::template::TemplateOffset;

    #[test]
    fn nothing_is_held_on_to_once_all_is_handed_out() {
        let len = ByteLen::new(256 * PageSize::SMALLEST);
        let memory = HostRange::new(HostAddr::new(1 << 30), len).unwrap();
        let region = Region::new(memory, TemplateOffset::new(0), PageSize::Small);
        let states = [PageStates::new(region.pages())];
        let regions = RegionMap::new(vec![region]);
        let run = |first: u64| Run {
            at: TemplateOffset::new(first * PageSize::SMALLEST),
            len: ByteLen::new(16 * PageSize::SMALLEST),
        };
        let mut give_back = GiveBack::new(&regions, [0, 32, 64, 96].map(run));
        for _ in 0..4 {
            assert!(!give_back.is_done());
            assert_eq!(give_back.next(&regions, &states).unwrap().pages, 16);
        }
        assert!(give_back.is_done());
        assert_eq!(give_back.runs.capacity(), 0);
    }
}
