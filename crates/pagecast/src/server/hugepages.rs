//! Whether the pool of hugepages has room for another fork.

use std::fs;

use super::failure::Refusal;
use super::fork::ForkState;
use super::record::ForkRecord;
use super::registry::Registry;
use crate::handshake::Layout;
use crate::page::PageSize;
use crate::session::Region;

/// The kernel's pool of 2 MiB pages.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Lets a fork in if the pool has a page for each of its own, besides those promised to forks that have not touched
/// theirs. Firecracker maps with `MAP_NORESERVE`, so the kernel promises nothing: without this check, a guest would freeze
/// at the first page that the pool does not have.
pub(super) fn admit(registry: &Registry, layout: &Layout) -> Result<(), Refusal> {
    let needed: u64 = layout.regions().iter().map(|(_, region)| huge_pages(region)).sum();
    if needed == 0 {
        return Ok(());
    }
    let promised: u64 = registry.all().iter().map(|record| outstanding(record)).sum();
    let available = free().saturating_sub(promised);
    if needed > available {
        return Err(Refusal::NotEnoughHugepages { needed, available });
    }
    Ok(())
}

/// How many pages of the pool are free and not reserved by somebody's `mmap`.
pub(super) fn free() -> u64 {
    let read = |name: &str| -> u64 {
        fs::read_to_string(format!("{POOL}/{name}"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}

/// How many huge pages a fork that is served may still take.
fn outstanding(record: &ForkRecord) -> u64 {
    if record.state() != ForkState::Serving {
        return 0;
    }
    let all: u64 = record.regions.get().into_iter().flatten().map(huge_pages).sum();
    // Forks have pages of one size, so what was installed were huge pages too. Those that were filled with zeros are not
    // counted, which errs on the safe side.
    all.saturating_sub(record.counters.installed_bytes.get() / PageSize::Huge.bytes())
}

fn huge_pages(region: &Region) -> u64 {
    match region.page_size() {
        PageSize::Small => 0,
        PageSize::Huge => region.pages() as u64,
    }
}
