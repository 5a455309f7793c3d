//! A region and the states of its pages.

use super::fault_around::FaultAround;
use super::page_states::PageStates;
use super::region::Region;

/// A region of a fork, with the states of its pages.
#[derive(Debug)]
pub(crate) struct TrackedRegion {
    pub(super) region: Region,
    pub(super) states: PageStates,
    /// Made at the first fault, since a VMM may have thousands of regions.
    pub(super) around: Option<Box<FaultAround>>,
}

impl From<Region> for TrackedRegion {
    /// Tracks `region`, with all pages absent.
    fn from(region: Region) -> Self {
        Self {
            region,
            states: PageStates::new(region.pages()),
            around: None,
        }
    }
}

impl AsRef<Region> for TrackedRegion {
    fn as_ref(&self) -> &Region {
        &self.region
    }
}
