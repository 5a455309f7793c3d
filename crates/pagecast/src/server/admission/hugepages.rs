//! The decision whether a VMM is served: if there are hugepages for it.

use crate::handshake::Layout;
use crate::page::PageSize;
use crate::server::fork::{ForkState, Refusal};
use crate::server::hugepages::HugeRoom;
use crate::server::registry::{ForkRecord, Registry};
use crate::session::Region;

/// Admits a fork if the pool has a page for each of its pages, besides those promised to forks that have not touched
/// theirs yet. Firecracker maps with `MAP_NORESERVE`, so the kernel reserves nothing. Without this check, a guest would
/// freeze at the first page that the pool does not have.
pub(in crate::server) fn admit(registry: &Registry, layout: &Layout) -> Result<(), Refusal> {
    let needed: u64 = layout.regions().iter().map(|(_, region)| huge_pages(region)).sum();
    if needed == 0 {
        return Ok(());
    }
    let promised: u64 = registry.all().iter().map(|record| outstanding(record)).sum();
    let room = HugeRoom::now();
    let available = room.pages.saturating_sub(promised);
    if needed > available {
        return Err(Refusal::NotEnoughHugepages {
            needed,
            available,
            cgroup: room.cgroup,
        });
    }
    Ok(())
}

/// The number of huge pages that a served fork may still take.
fn outstanding(record: &ForkRecord) -> u64 {
    if record.state() != ForkState::Serving {
        return 0;
    }
    let all: u64 = record.regions.get().into_iter().flatten().map(huge_pages).sum();
    // A fork has pages of one size, so its installed pages are huge ones too. Pages of zeros are not counted, which
    // errs on the safe side.
    all.saturating_sub(record.counters.installed_bytes.get() / PageSize::Huge.bytes())
}

fn huge_pages(region: &Region) -> u64 {
    match region.page_size() {
        PageSize::Small => 0,
        PageSize::Huge => region.pages() as u64,
    }
}
