//! Feature bits of a userfaultfd (`UFFD_FEATURE_*` of `linux/userfaultfd.h`).

use bitflags::bitflags;

bitflags! {
    /// What a userfaultfd was asked to do when it was created. It cannot change afterwards.
    ///
    /// The values are those of the kernel's ABI; bits this list does not know are kept.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Write-protect faults are delivered.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// A `fork` of the process is delivered, with a userfaultfd for the child.
        const EVENT_FORK = 1 << 1;
        /// An `mremap` of registered memory is delivered.
        const EVENT_REMAP = 1 << 2;
        /// Memory given back (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`) is delivered.
        const EVENT_REMOVE = 1 << 3;
        /// Missing faults work on hugetlbfs.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing faults work on shared memory.
        const MISSING_SHMEM = 1 << 5;
        /// A `munmap` of registered memory is delivered.
        const EVENT_UNMAP = 1 << 6;
        /// A fault raises SIGBUS instead of an event.
        const SIGBUS = 1 << 7;
        /// Page faults carry the id of the thread.
        const THREAD_ID = 1 << 8;
        /// Minor faults work on hugetlbfs.
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults work on shared memory.
        const MINOR_SHMEM = 1 << 10;
        /// Page faults carry the exact address, not that of the page.
        const EXACT_ADDRESS = 1 << 11;
        /// Write protection works on hugetlbfs and shared memory.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write protection covers pages that are not there yet.
        const WP_UNPOPULATED = 1 << 13;
        /// `UFFDIO_POISON` exists.
        const POISON = 1 << 14;
        /// Write-protect faults resolve themselves.
        const WP_ASYNC = 1 << 15;
        /// `UFFDIO_MOVE` exists.
        const MOVE = 1 << 16;
        // Bits of newer kernels are kept, not dropped.
        const _ = !0;
    }
}
