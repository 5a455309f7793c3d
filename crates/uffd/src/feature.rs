//! Feature bits of a userfaultfd (`UFFD_FEATURE_*` of `linux/userfaultfd.h`).

use bitflags::bitflags;

bitflags! {
    /// Features that a userfaultfd was created with. They cannot change afterwards.
    ///
    /// The values are those of the kernel's ABI; unknown bits are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Reports write-protect faults.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// Reports a `fork` of the process, with a userfaultfd for the child.
        const EVENT_FORK = 1 << 1;
        /// Reports an `mremap` of registered memory.
        const EVENT_REMAP = 1 << 2;
        /// Reports memory that is given back (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`).
        const EVENT_REMOVE = 1 << 3;
        /// Missing faults work on hugetlbfs.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing faults work on shared memory.
        const MISSING_SHMEM = 1 << 5;
        /// Reports a `munmap` of registered memory.
        const EVENT_UNMAP = 1 << 6;
        /// A fault raises SIGBUS instead of an event.
        const SIGBUS = 1 << 7;
        /// Page faults carry the thread ID.
        const THREAD_ID = 1 << 8;
        /// Minor faults work on hugetlbfs.
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults work on shared memory.
        const MINOR_SHMEM = 1 << 10;
        /// Page faults carry the exact address, not that of the page.
        const EXACT_ADDRESS = 1 << 11;
        /// Write protection works on hugetlbfs and shared memory.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write protection covers absent pages.
        const WP_UNPOPULATED = 1 << 13;
        /// `UFFDIO_POISON` exists.
        const POISON = 1 << 14;
        /// Write-protect faults resolve themselves.
        const WP_ASYNC = 1 << 15;
        /// `UFFDIO_MOVE` exists.
        const MOVE = 1 << 16;
        // Bits of newer kernels are kept.
        const _ = !0;
    }
}
