//! Guest memory of the simulated VMM: the only module of the testkit with `unsafe`.
#![expect(
    unsafe_code,
    reason = "mapping memory and touching it behind the compiler's back is what a VMM does"
)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use pagecast_uffd::{ByteLen, Errno, HostAddr, HostRange, Uffd};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags};
use serde::{Deserialize, Serialize};

use crate::pattern::WORD_SIZE;

/// The size of a guest's pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageSize {
    /// 4 KiB.
    #[default]
    Base,
    /// 4 KiB, and the kernel may make larger ones of them (`MADV_HUGEPAGE`).
    Transparent,
    /// 2 MiB, out of the host's pool of hugepages.
    Huge,
}

impl PageSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Base | Self::Transparent => 4096,
            Self::Huge => 2 << 20,
        }
    }
}

/// A mapping like that of Firecracker for a guest: of anonymous memory, or of a mem-file.
///
/// The address is private to this module, and memory is reached by word or byte index only. So there is no reference
/// into it: its content changes whenever a page is installed.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    start: NonNull<c_void>,
    len: usize,
    /// Whether it maps a mem-file rather than anonymous memory.
    of_file: bool,
}

// SAFETY: `start` is the address of a mapping that this value owns; it means the same on every thread.
unsafe impl Send for GuestMemory {}
// SAFETY: what `&self` allows is atomic access to words, and system calls that the kernel serialises.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps `len` bytes (whole pages), absent until touched.
    pub(crate) fn map(len: u64, page_size: PageSize) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if page_size == PageSize::Huge {
            flags |= MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        // SAFETY: a new mapping where the kernel likes it replaces none.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        if page_size == PageSize::Transparent {
            // SAFETY: this is the new mapping, and what is advised changes no bytes.
            unsafe { rustix::mm::madvise(start, len, Advice::LinuxHugepage)? };
        }
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            start,
            len,
            of_file: false,
        })
    }

    /// Maps `len` bytes of a mem-file from `offset` on (whole pages), as Firecracker does for a `File` backend: reads
    /// share the file's pages, writes are private to this process.
    pub(crate) fn map_file(file: impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes it replaces none. Nothing but the atomic accesses below reaches its
        // words, so whoever writes the file meanwhile changes values that may be any.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, offset)? };
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            start,
            len,
            of_file: true,
        })
    }

    /// Its address range.
    pub(crate) fn range(&self) -> HostRange {
        let start = HostAddr::new(self.start.addr().get() as u64);
        HostRange::new(start, ByteLen::new(self.len as u64)).expect("a mapping is not empty and ends before the end")
    }

    /// Registers all of it for missing faults.
    pub(crate) fn register(&self, uffd: &Uffd) -> Result<(), Errno> {
        // SAFETY: this is our mapping, it holds nothing but words that are only reached by the atomic accesses below, to
        // which any bits at any time are fine, and no reference to them outlives such an access.
        unsafe { uffd.register(self.range()) }
    }

    /// Registers all of it for missing faults and write protection.
    pub(crate) fn register_write_protected(&self, uffd: &Uffd) -> Result<(), Errno> {
        // SAFETY: as in `register`.
        unsafe { uffd.register_write_protected(self.range()) }
    }

    /// Gives the pages of the bytes `range` back (`MADV_DONTNEED`). Waits until the server has read the removal.
    ///
    /// Refused for a mem-file, whose bytes would come back.
    pub(crate) fn remove(&self, range: Range<usize>) -> io::Result<()> {
        if self.of_file {
            return Err(io::ErrorKind::Unsupported.into());
        }
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} is outside"
        );
        // SAFETY: the assertion keeps it within the mapping.
        let start = unsafe { self.start.byte_add(range.start) };
        // SAFETY: the range is within our mapping, where no Rust object lives; words turning into zeros are as good as
        // any other values.
        unsafe { rustix::mm::madvise(start.as_ptr(), range.len(), Advice::LinuxDontNeed)? };
        Ok(())
    }

    /// Reads the word at byte `offset`, a multiple of eight. Blocks while its page is absent.
    pub(crate) fn load(&self, offset: usize) -> u64 {
        // A black box keeps the load, even if its value is not used.
        std::hint::black_box(self.word(offset).load(Ordering::Relaxed))
    }

    /// Writes the word at byte `offset`, a multiple of eight. Blocks while its page is absent.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    // Atomic rather than volatile: threads of a guest race, and volatile accesses may not.
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(WORD_SIZE) && offset < self.len,
            "no word at {offset} of {}",
            self.len
        );
        // SAFETY: the assertion keeps it within the mapping (whose length is whole pages, so the word's end is inside too).
        let word = unsafe { self.start.byte_add(offset) };
        // SAFETY: aligned (a mapping starts at a page, the offset is a multiple of eight); mapped as long as `self`, to
        // which the reference is tied; everybody in this process uses atomics, and any bits are a `u64`.
        unsafe { AtomicU64::from_ptr(word.cast().as_ptr()) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: our mapping, all of it, and nobody can reach it after this. Unmapping whole mappings cannot fail, and
        // if it did it would be a leak.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.len) };
    }
}

/// A userfaultfd without `UFFDIO_API`, for peers that break the rules.
pub(crate) fn uffd_without_api() -> io::Result<OwnedFd> {
    // SAFETY: making the object does nothing to memory; without `UFFDIO_API` it never will.
    Ok(unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK)? })
}
