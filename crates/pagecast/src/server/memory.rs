//! How much memory completing forks takes, and how much there is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use procfs::Current;

use super::error::NotEnoughMemory;
use super::hugepages;
use super::record::ForkRecord;
use crate::cgroup::MemoryCgroup;
use crate::page::PageSize;
use crate::session::Region;
use crate::template::{PageSource, Template, TemplateOffset};

/// What is never used up: this part of what is available stays for everybody else.
const SPARE_PART: u64 = 16;

/// What completing some forks takes, at most.
#[derive(Clone, Copy, Debug, Default)]
struct Needed {
    small_bytes: u64,
    huge_pages: u64,
}

/// Compares what installing the rest of these forks takes with the memory of the host, of their cgroups and in the pool
/// of hugepages, by what is known of the templates' zeros.
pub(super) fn check_room(forks: &[Arc<ForkRecord>]) -> Result<(), NotEnoughMemory> {
    let mut all = Needed::default();
    let mut by_cgroup: BTreeMap<MemoryCgroup, u64> = BTreeMap::new();
    for fork in forks {
        let needed = needed(fork);
        all.small_bytes += needed.small_bytes;
        all.huge_pages += needed.huge_pages;
        for cgroup in fork.pid().map(MemoryCgroup::of_process).unwrap_or_default() {
            *by_cgroup.entry(cgroup).or_default() += needed.small_bytes;
        }
    }
    let check = |needed: u64, available: Option<u64>, place: &dyn Fn() -> String| {
        let Some(available) = available.map(|bytes| bytes - bytes / SPARE_PART) else {
            return Ok(());
        };
        if needed <= available {
            return Ok(());
        }
        Err(NotEnoughMemory {
            forks: forks.len(),
            needed,
            available,
            place: place(),
        })
    };
    check(all.small_bytes, host_available(), &|| "on this host".to_owned())?;
    for (cgroup, needed) in &by_cgroup {
        check(*needed, cgroup.available(), &|| {
            format!("in the cgroup {}", cgroup.folder().display())
        })?;
    }
    let free = hugepages::free();
    if all.huge_pages > free {
        return Err(NotEnoughMemory {
            forks: forks.len(),
            needed: all.huge_pages * PageSize::Huge.bytes(),
            available: free * PageSize::Huge.bytes(),
            place: "in the pool of hugepages".to_owned(),
        });
    }
    Ok(())
}

/// Looks for more zeros in the templates of these forks, as long as there is time: each is a page less to install.
pub(super) fn find_zeros(forks: &[Arc<ForkRecord>], until: Instant) {
    let mut templates: Vec<&Template> = Vec::new();
    for fork in forks {
        if !templates.iter().any(|known| known.is_same(&fork.template)) {
            templates.push(&fork.template);
        }
    }
    for template in templates {
        template.find_zeros(until);
    }
}

/// What is left to install of a fork: its memory, less the template's zeros, less what has been installed (each page of
/// the template is installed once at most). Removed pages are counted though they are not installed, so this errs on
/// the safe side.
fn needed(fork: &ForkRecord) -> Needed {
    let mut needed = Needed::default();
    let source = fork.template.source();
    let mut installed = fork.counters.installed_bytes.get();
    for region in fork.regions.get().into_iter().flatten() {
        let bytes = bytes_not_zero(region, source);
        let left = bytes.saturating_sub(installed);
        installed = installed.saturating_sub(bytes);
        match region.page_size() {
            PageSize::Small => needed.small_bytes += left,
            PageSize::Huge => needed.huge_pages += left / PageSize::Huge.bytes(),
        }
    }
    needed
}

fn bytes_not_zero(region: &Region, source: &dyn PageSource) -> u64 {
    let page = region.page_size();
    let start = region.offset().get();
    let pages = 0..region.pages() as u64;
    let data =
        pages.filter(|index| !source.is_known_zero(TemplateOffset::new(start + index * page.bytes()), page.len()));
    data.count() as u64 * page.bytes()
}

/// What the host can give without swapping.
fn host_available() -> Option<u64> {
    procfs::Meminfo::current().ok()?.mem_available
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_says_what_it_has() {
        assert!(host_available().unwrap() > 0);
    }
}
