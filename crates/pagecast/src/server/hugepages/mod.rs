//! Hugepages: how many more can be installed, and whether one is there.

pub(super) mod presence;

use std::fs;
use std::path::{Path, PathBuf};

use crate::cgroup::HugetlbCgroup;
use crate::memory;
use crate::page::PageSize;

/// The kernel's pool of 2 MiB pages.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// The number of further 2 MiB pages that this process can install.
pub(super) struct HugeRoom {
    pub(super) pages: u64,
    /// Our cgroup, if its limit leaves no more: the kernel charges hugepages to the process that installs them.
    pub(super) cgroup: Option<PathBuf>,
}

impl HugeRoom {
    /// The current room.
    pub(super) fn now() -> Self {
        let mut room = Self {
            pages: pool(Path::new(POOL), memory::host_available()),
            cgroup: None,
        };
        for cgroup in HugetlbCgroup::own() {
            if let Some(bytes) = cgroup.available()
                && bytes / PageSize::Huge.bytes() < room.pages
            {
                room = Self {
                    pages: bytes / PageSize::Huge.bytes(),
                    cgroup: Some(cgroup.folder().to_owned()),
                };
            }
        }
        room
    }
}

/// The number of pages that a pool can give: free pages that no `mmap` has reserved, and pages that the kernel may add
/// (`vm.nr_overcommit_hugepages`), as far as the host has memory for them.
fn pool(pool: &Path, host_available: Option<u64>) -> u64 {
    let read = |name: &str| -> u64 {
        fs::read_to_string(pool.join(name))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    let may_be_added = read("nr_overcommit_hugepages").saturating_sub(read("surplus_hugepages"));
    let memory = host_available.map_or(u64::MAX, |bytes| memory::usable(bytes) / PageSize::Huge.bytes());
    let free = read("free_hugepages").saturating_add(may_be_added.min(memory));
    free.saturating_sub(read("resv_hugepages"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_may_add_to_a_pool_counts_as_far_as_there_is_memory() {
        let folder = tempfile::tempdir().unwrap();
        let counts = |free: u64, reserved: u64, overcommit: u64, surplus: u64| {
            for (name, count) in [
                ("free_hugepages", free),
                ("resv_hugepages", reserved),
                ("nr_overcommit_hugepages", overcommit),
                ("surplus_hugepages", surplus),
            ] {
                fs::write(folder.path().join(name), format!("{count}\n")).unwrap();
            }
            pool(folder.path(), Some(16 * 100 * PageSize::Huge.bytes()))
        };
        assert_eq!(counts(10, 4, 0, 0), 6);
        assert_eq!(counts(10, 4, 30, 10), 26);
        assert_eq!(counts(0, 10, 30, 10), 10, "reserved pages may be added ones");
        assert_eq!(counts(10, 4, 30, 40), 6);
        assert_eq!(
            counts(10, 0, 1 << 40, 0),
            10 + 1500,
            "a sixteenth of the memory is left alone"
        );
        assert_eq!(pool(&folder.path().join("none"), None), 0);
    }
}
