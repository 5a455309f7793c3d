//! The regions of a fork, validated against its template.

use pagecast_uffd::{ByteLen, HostAddr, HostRange};

use super::message::RequestedRegion;
use crate::page::PageSize;
use crate::session::{Region, RegionMap};
use crate::template::TemplateOffset;

/// The regions of a fork that can be served: aligned, without overlaps, within the template.
#[derive(Debug)]
pub struct Layout {
    regions: RegionMap,
}

/// Why regions cannot be served. Regions are numbered from 0, in the order of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no region.
    #[error("the VMM has no memory regions")]
    NoRegions,
    /// The page size is not served.
    #[error("region {index} has pages of {bytes} bytes; 4096 and 2097152 are served")]
    PageSize {
        /// Number of the region.
        index: usize,
        /// The requested page size.
        bytes: u64,
    },
    /// An empty region.
    #[error("region {index} is empty")]
    Empty {
        /// Number of the region.
        index: usize,
    },
    /// A number is not a multiple of the page size.
    #[error("region {index}: {field} {value:#x} is not a multiple of its page size of {page_size}")]
    Unaligned {
        /// Number of the region.
        index: usize,
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: u64,
        /// The page size.
        page_size: PageSize,
    },
    /// Address and size exceed 64 bits.
    #[error("region {index}: its address and size exceed the address space")]
    AddressOverflow {
        /// Number of the region.
        index: usize,
    },
    /// Offset and size exceed 64 bits, or the template.
    #[error("region {index} needs the template up to byte {end}, which has {template} bytes")]
    PastTheEnd {
        /// Number of the region.
        index: usize,
        /// The end of the region; `u64::MAX` on overflow.
        end: u64,
        /// The length of the template.
        template: u64,
    },
    /// Two regions share addresses.
    #[error("regions {first} and {second} overlap in memory")]
    OverlapInMemory {
        /// The region that begins first.
        first: usize,
        /// The other region.
        second: usize,
    },
    /// Two regions share a part of the template.
    #[error("regions {first} and {second} overlap in the template")]
    OverlapInTemplate {
        /// The region that begins first.
        first: usize,
        /// The other region.
        second: usize,
    },
}

impl Layout {
    /// Validates `requested` against a template of `template` bytes.
    ///
    /// # Errors
    ///
    /// The first [`LayoutError`] found.
    pub fn validate(requested: &[RequestedRegion], template: ByteLen) -> Result<Self, LayoutError> {
        if requested.is_empty() {
            return Err(LayoutError::NoRegions);
        }
        let regions = requested
            .iter()
            .enumerate()
            .map(|(index, region)| validate_one(index, region, template))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some((first, second)) = overlap(&regions, |region| {
            let range = region.memory();
            (range.start().get(), range.end().get())
        }) {
            return Err(LayoutError::OverlapInMemory { first, second });
        }
        if let Some((first, second)) = overlap(&regions, |region| {
            let start = region.offset().get();
            // `validate_one` has checked that it ends within the template.
            (start, start.saturating_add(region.memory().len().get()))
        }) {
            return Err(LayoutError::OverlapInTemplate { first, second });
        }
        Ok(Self {
            regions: RegionMap::new(regions),
        })
    }

    /// Returns the regions, for a session.
    pub fn into_regions(self) -> RegionMap {
        self.regions
    }

    /// Returns the regions.
    pub fn regions(&self) -> &RegionMap {
        &self.regions
    }
}

fn validate_one(index: usize, region: &RequestedRegion, template: ByteLen) -> Result<Region, LayoutError> {
    let page_size = PageSize::from_bytes(region.page_size).ok_or(LayoutError::PageSize {
        index,
        bytes: region.page_size,
    })?;
    for (field, value) in [
        ("base_host_virt_addr", region.base_host_virt_addr),
        ("size", region.size),
        ("offset", region.offset),
    ] {
        if !page_size.is_aligned(value) {
            return Err(LayoutError::Unaligned {
                index,
                field,
                value,
                page_size,
            });
        }
    }
    if region.size == 0 {
        return Err(LayoutError::Empty { index });
    }
    let memory = HostRange::new(HostAddr::new(region.base_host_virt_addr), ByteLen::new(region.size))
        .ok_or(LayoutError::AddressOverflow { index })?;
    let end = region.offset.saturating_add(region.size);
    if end > template.get() {
        return Err(LayoutError::PastTheEnd {
            index,
            end,
            template: template.get(),
        });
    }
    Ok(Region::new(memory, TemplateOffset::new(region.offset), page_size))
}

/// Returns the first two regions whose extents (start, end) overlap.
fn overlap(regions: &[Region], extent: impl Fn(&Region) -> (u64, u64)) -> Option<(usize, usize)> {
    let mut extents: Vec<_> = regions
        .iter()
        .enumerate()
        .map(|(index, region)| (extent(region), index))
        .collect();
    extents.sort_unstable();
    extents.windows(2).find_map(|pair| match pair {
        [((_, end), first), ((start, _), second)] if start < end => Some((*first, *second)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(base: u64, size: u64, offset: u64, page_size: u64) -> RequestedRegion {
        RequestedRegion {
            base_host_virt_addr: base,
            size,
            offset,
            page_size,
        }
    }

    fn refusal(regions: &[RequestedRegion]) -> LayoutError {
        Layout::validate(regions, ByteLen::new(64 * MIB)).expect_err("to be refused")
    }

    #[test]
    fn no_regions_are_refused() {
        assert_eq!(refusal(&[]), LayoutError::NoRegions);
    }

    #[test]
    fn odd_page_sizes_are_refused() {
        for bytes in [0, 3, 1 << 30] {
            assert_eq!(
                refusal(&[region(0, MIB, 0, bytes)]),
                LayoutError::PageSize { index: 0, bytes }
            );
        }
    }

    #[test]
    fn unaligned_numbers_are_refused_by_name() {
        let field = |region| match refusal(&[region]) {
            LayoutError::Unaligned { field, .. } => field,
            other => panic!("{other}"),
        };
        assert_eq!(field(region(1, MIB, 0, 4096)), "base_host_virt_addr");
        assert_eq!(field(region(0, MIB + 1, 0, 4096)), "size");
        assert_eq!(field(region(0, MIB, 512, 4096)), "offset");
        assert_eq!(field(region(0, 2 * MIB, 4096, 2 * MIB)), "offset");
    }

    #[test]
    fn empty_regions_and_overflows_are_refused() {
        assert_eq!(refusal(&[region(0, 0, 0, 4096)]), LayoutError::Empty { index: 0 });
        let last_page = u64::MAX - 4095;
        assert_eq!(
            refusal(&[region(last_page, 8192, 0, 4096)]),
            LayoutError::AddressOverflow { index: 0 }
        );
        assert!(matches!(
            refusal(&[region(0, 8192, last_page, 4096)]),
            LayoutError::PastTheEnd { end: u64::MAX, .. }
        ));
    }

    #[test]
    fn a_template_shorter_than_the_guest_is_refused() {
        assert_eq!(
            refusal(&[region(0, 64 * MIB, 0, 4096), region(64 * MIB, MIB, 64 * MIB, 4096)]),
            LayoutError::PastTheEnd {
                index: 1,
                end: 65 * MIB,
                template: 64 * MIB
            }
        );
    }

    #[test]
    fn overlaps_are_refused_whatever_the_order() {
        let (a, b) = (
            region(8 * MIB, 4 * MIB, 0, 4096),
            region(4 * MIB, 4 * MIB + 4096, 32 * MIB, 4096),
        );
        assert_eq!(refusal(&[a, b]), LayoutError::OverlapInMemory { first: 1, second: 0 });
        let (a, b) = (region(0, 4 * MIB, 0, 4096), region(8 * MIB, MIB, 4 * MIB - 4096, 4096));
        assert_eq!(refusal(&[a, b]), LayoutError::OverlapInTemplate { first: 0, second: 1 });
        let twice = region(0, MIB, 0, 4096);
        assert!(matches!(refusal(&[twice, twice]), LayoutError::OverlapInMemory { .. }));
    }

    proptest! {
        /// For any numbers: accepted regions are within the template, aligned, and do not overlap.
        #[test]
        fn what_is_accepted_can_be_served(
            requested in proptest::collection::vec(
                (0..40u64, 0..20u64, 0..40u64, prop_oneof![Just(4096u64), Just(2 * MIB), any::<u64>()]), 0..6),
            unit in prop_oneof![Just(4096u64), Just(2 * MIB), Just(1u64), Just(u64::MAX / 16)],
        ) {
            let template = 64 * MIB;
            let requested: Vec<_> = requested.into_iter()
                .map(|(base, size, offset, page)| region(base.wrapping_mul(unit), size.wrapping_mul(unit), offset.wrapping_mul(unit), page))
                .collect();
            let Ok(layout) = Layout::validate(&requested, ByteLen::new(template)) else { return Ok(()) };
            prop_assert_eq!(layout.regions().iter().count(), requested.len());
            for (_, region) in layout.regions().iter() {
                let end = u128::from(region.offset().get()) + u128::from(region.memory().len().get());
                prop_assert!(end <= u128::from(template));
                prop_assert!(region.page_size().is_aligned(region.memory().start().get()));
                let (start, end) = (region.memory().start(), region.memory().end());
                let hits = layout.regions().iter().filter(|(_, other)| other.memory().start() < end && start < other.memory().end()).count();
                prop_assert_eq!(hits, 1);
            }
        }
    }
}
