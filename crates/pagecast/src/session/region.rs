//! The regions of a fork, which map addresses to pages of the template.

use pagecast_uffd::{ByteLen, HostAddr, HostRange};

use crate::page::{PageIndex, PageSize};
use crate::template::TemplateOffset;

/// One guest memory mapping. Created only by [`Layout::validate`](crate::handshake::Layout::validate), which guarantees
/// that address, size and offset are multiples of the page size, and that the region ends within the template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    memory: HostRange,
    offset: TemplateOffset,
    page_size: PageSize,
}

impl Region {
    pub(crate) const fn new(memory: HostRange, offset: TemplateOffset, page_size: PageSize) -> Self {
        Self {
            memory,
            offset,
            page_size,
        }
    }

    /// The address range of the region in the VMM.
    pub const fn memory(&self) -> HostRange {
        self.memory
    }

    /// The template offset of its content.
    pub const fn offset(&self) -> TemplateOffset {
        self.offset
    }

    /// The size of its pages.
    pub const fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The number of pages.
    pub fn pages(&self) -> usize {
        to_usize(self.memory.len().get() / self.page_size.bytes())
    }

    /// The page that holds `addr`, if it lies in this region.
    pub fn page_at(&self, addr: HostAddr) -> Option<PageIndex> {
        if !self.memory.contains(addr) {
            return None;
        }
        let into = addr.checked_offset_from(self.memory.start())?;
        Some(PageIndex::new(to_usize(into.get() / self.page_size.bytes())))
    }

    /// The address of `page` in the VMM. `page` is in this region.
    pub(crate) fn address_of(&self, page: PageIndex) -> HostAddr {
        HostAddr::new(self.memory.start().get() + self.bytes_before(page))
    }

    /// The template offset of `page`. `page` is in this region.
    pub(crate) fn offset_of(&self, page: PageIndex) -> TemplateOffset {
        TemplateOffset::new(self.offset.get() + self.bytes_before(page))
    }

    /// The length of `pages` pages.
    pub(crate) fn len_of(&self, pages: usize) -> ByteLen {
        ByteLen::new(self.bytes_before(PageIndex::new(pages)))
    }

    /// `pages` pages at `first`, as memory of the VMM. At least one page, all in this region.
    pub(crate) fn range_of(&self, first: PageIndex, pages: usize) -> HostRange {
        HostRange::new(self.address_of(first), self.len_of(pages)).expect("pages of a region, which does not overflow")
    }

    /// The pages that `range` covers *wholly*, as first page and count.
    ///
    /// The kernel gives back whole pages only (`madvise(2)` refuses or rounds down on hugetlbfs). If a range covers a
    /// part of a page, that page is not given back.
    pub(crate) fn pages_within(&self, range: HostRange) -> Option<(PageIndex, usize)> {
        let common = self.memory.intersection(range)?;
        let from = common.start().checked_offset_from(self.memory.start())?.get();
        let to = common.end().checked_offset_from(self.memory.start())?.get();
        let first = from.div_ceil(self.page_size.bytes());
        let end = to / self.page_size.bytes();
        let count = end.checked_sub(first).filter(|count| *count > 0)?;
        Some((PageIndex::new(to_usize(first)), to_usize(count)))
    }

    /// Cannot overflow: `Layout::validate` checked that the whole region fits, and `page` is at most its end.
    fn bytes_before(&self, page: PageIndex) -> u64 {
        debug_assert!(page.get() <= self.pages());
        page.get() as u64 * self.page_size.bytes()
    }
}

/// Converts a count of pages. The pages of an address space fit into a `usize` of 64 bits. On smaller machines, which
/// never serve pages, the count saturates.
fn to_usize(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl AsRef<Region> for Region {
    fn as_ref(&self) -> &Region {
        self
    }
}

/// The number of a region within its fork, in the order of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(usize);

impl RegionIndex {
    pub(crate) const FIRST: Self = Self(0);

    pub(crate) const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// All regions of a fork, found by address. `R` is a region, or a region with more data.
#[derive(Debug)]
pub struct RegionMap<R = Region> {
    /// By address; they do not overlap.
    sorted: Box<[R]>,
}

impl RegionMap {
    /// Creates the map. `regions` must not overlap.
    pub(crate) fn new(mut regions: Vec<Region>) -> Self {
        regions.sort_unstable_by_key(|region| region.memory.start());
        Self {
            sorted: regions.into_boxed_slice(),
        }
    }
}

impl<R: AsRef<Region>> RegionMap<R> {
    /// The same regions, each as a `T`.
    pub(crate) fn into_each<T: From<R>>(self) -> RegionMap<T> {
        RegionMap {
            sorted: self.sorted.into_iter().map(T::from).collect(),
        }
    }

    /// The region and page that hold `addr`.
    pub fn find(&self, addr: HostAddr) -> Option<(RegionIndex, PageIndex)> {
        let after = self
            .sorted
            .partition_point(|region| region.as_ref().memory.start() <= addr);
        let index = after.checked_sub(1)?;
        let page = self.sorted.get(index)?.as_ref().page_at(addr)?;
        Some((RegionIndex(index), page))
    }

    /// The region with this index, if there is one.
    pub fn get(&self, index: RegionIndex) -> Option<&R> {
        self.sorted.get(index.0)
    }

    pub(crate) fn get_mut(&mut self, index: RegionIndex) -> Option<&mut R> {
        self.sorted.get_mut(index.0)
    }

    /// The pages that hold any of `len` bytes of the template at `at`. For each region that has some, returns the first
    /// page and the count.
    pub(crate) fn pages_of_template(
        &self,
        at: TemplateOffset,
        len: ByteLen,
    ) -> impl Iterator<Item = (RegionIndex, PageIndex, usize)> {
        let end = at.get().saturating_add(len.get());
        self.iter().filter_map(move |(index, region)| {
            let region = region.as_ref();
            let offset = region.offset.get();
            let from = at.get().max(offset);
            let to = end.min(offset + region.memory.len().get());
            let page = region.page_size.bytes();
            (from < to).then(|| {
                let first = (from - offset) / page;
                let pages = (to - offset).div_ceil(page) - first;
                (index, PageIndex::new(to_usize(first)), to_usize(pages))
            })
        })
    }

    /// The first page of the first region, as memory of the VMM; `None` if there is no region.
    pub(crate) fn first_page(&self) -> Option<HostRange> {
        let first = self.sorted.first()?.as_ref();
        Some(first.range_of(PageIndex::new(0), 1))
    }

    /// All regions, by address.
    pub fn iter(&self) -> impl Iterator<Item = (RegionIndex, &R)> {
        self.sorted
            .iter()
            .enumerate()
            .map(|(index, region)| (RegionIndex(index), region))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut R> {
        self.sorted.iter_mut()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(start: u64, pages: u64, page_size: PageSize) -> Region {
        let memory = HostRange::new(HostAddr::new(start), ByteLen::new(pages * page_size.bytes())).unwrap();
        Region::new(memory, TemplateOffset::new(0), page_size)
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        let region = region(0x40_0000, 4, PageSize::Huge);
        let range = |start, end| HostRange::between(HostAddr::new(start), HostAddr::new(end)).unwrap();
        let pages = |range| region.pages_within(range).map(|(first, count)| (first.get(), count));
        assert_eq!(pages(range(0x40_0000, 0x80_0000)), Some((0, 2)));
        assert_eq!(pages(range(0x40_1000, 0x80_0000)), Some((1, 1)));
        assert_eq!(pages(range(0x40_1000, 0x60_1000)), None);
        assert_eq!(pages(range(0, u64::MAX)), Some((0, 4)));
        assert_eq!(pages(range(0, 0x1000)), None);
    }

    proptest! {
        /// Looking up by bisection finds what looking at every region finds.
        #[test]
        fn find_agrees_with_a_search_of_all(
            gaps in proptest::collection::vec((0..4u64, 1..5u64, any::<bool>()), 1..12),
            probes in proptest::collection::vec(0..0x1000_0000u64, 40),
        ) {
            let mut at = 0x20_0000;
            let mut regions = Vec::new();
            for (gap, pages, huge) in gaps {
                let page_size = if huge { PageSize::Huge } else { PageSize::Small };
                at = (at + gap * 4096).next_multiple_of(page_size.bytes());
                regions.push(region(at, pages, page_size));
                at += pages * page_size.bytes();
            }
            let map = RegionMap::new(regions.iter().rev().copied().collect());
            let edges = regions.iter().flat_map(|r| [r.memory.start().get(), r.memory.end().get(), r.memory.end().get() - 1]);
            for probe in probes.into_iter().chain(edges.collect::<Vec<_>>()).map(HostAddr::new) {
                let expected = regions.iter().find(|r| r.memory.contains(probe));
                let found = map.find(probe);
                prop_assert_eq!(found.and_then(|(index, _)| map.get(index)), expected);
                if let (Some((_, page)), Some(region)) = (found, expected) {
                    prop_assert!(region.range_of(page, 1).contains(probe));
                }
            }
        }
    }
}
