//! Checks whether a hugepage is there, if the kernel does not say.

use std::fs::File;
use std::os::unix::fs::FileExt;

use pagecast_uffd::{HostAddr, HostRange, Outcome};

use super::HugeRoom;
use crate::page::PageSize;

/// Returns the real outcome of an install of hugepages that answered `outcome`.
///
/// `UFFDIO_COPY` into hugetlbfs returns `EEXIST` if the page is there, but also if there is none left for it: the pool
/// is empty, or our cgroup is at its limit (`hugetlb_mfill_atomic_pte`; tried on 6.18). If an absent page counted as
/// present, it would read as zeros once the fork is complete.
pub(in crate::server) fn settle(outcome: Outcome, page_size: PageSize, to: HostRange, pid: i32) -> Outcome {
    if page_size == PageSize::Small || outcome != Outcome::AlreadyPresent {
        return outcome;
    }
    // If the page tables of the VMM may not be read, assume that there was a free page if there is one now.
    if is_present(pid, to.start()).unwrap_or_else(|| HugeRoom::now().pages > 0) {
        Outcome::AlreadyPresent
    } else {
        Outcome::OutOfMemory
    }
}

/// Returns whether a page of a process is in its page table (`/proc/PID/pagemap`); `None` if that may not be read.
fn is_present(pid: i32, address: HostAddr) -> Option<bool> {
    // Bit 63: present; bit 62: swapped, or on its way to another place.
    const THERE: u64 = 0b11 << 62;

    let page = address.get() / rustix::param::page_size() as u64;
    let mut entry = [0; size_of::<u64>()];
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok()?;
    pagemap.read_exact_at(&mut entry, page * 8).ok()?;
    Some(u64::from_ne_bytes(entry) & THERE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_stack_is_present_and_page_zero_is_not() {
        let here = 1u8;
        let pid = i32::try_from(std::process::id()).unwrap();
        let address = HostAddr::new((&raw const here).addr() as u64);
        assert_eq!(is_present(pid, address), Some(true));
        assert_eq!(is_present(pid, HostAddr::new(0)), Some(false));
        assert_eq!(is_present(-1, address), None);
    }
}
