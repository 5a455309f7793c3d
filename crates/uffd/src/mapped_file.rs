//! Parts of a file, mapped to control their page cache. No byte is read or written through the mapping.
//!
//! A mapping can ask for pages of 2 MiB in the page cache (`MADV_HUGEPAGE`), and lock pages (`mlock`). A `read` can do
//! neither. With pages of 2 MiB (ext4 since Linux 6.16, XFS, tmpfs with `huge=`) a VMM maps 2 MiB of the file in one
//! fault, though a write still copies 4 KiB only.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd};

use linux_raw_sys::general as sys;
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::address::ByteLen;
use crate::outcome::Errno;

/// `PAGEMAP_SCAN` on `/proc/PID/pagemap` (Linux 6.7).
const PAGEMAP_SCAN: Opcode = opcode::read_write::<sys::pm_scan_arg>(b'f', 16);
const _: () = assert!(PAGEMAP_SCAN == 0xC060_6610);

const PAGE: usize = 4096;

/// Bytes around a fault that the kernel maps if they are in the page cache, aligned (`fault_around_bytes`).
const AROUND: usize = 64 * 1024;

/// Number of pages that one `mincore` asks about.
const RESIDENT_PAGES: usize = 512;

/// Number of runs of large pages that one scan returns.
const REGIONS: usize = 32;

/// A part of a file, mapped read-only and shared, to control its page cache. Dropping it unmaps and unlocks it, and so
/// does any end of the process.
#[derive(Debug)]
pub struct MappedFile {
    start: *mut c_void,
    len: usize,
}

// SAFETY: nothing is ever read or written through the address; it is only handed to system calls, which any thread may
// make on a mapping of its process.
unsafe impl Send for MappedFile {}
// SAFETY: as above; and the kernel orders such calls.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `len` bytes of `file` from `at` on, both multiples of 4 KiB. If both are multiples of 2 MiB, so is the
    /// address, on file systems with pages of that size.
    ///
    /// # Errors
    ///
    /// The kernel's: `EINVAL` if `len` is zero or `at` is not a multiple of 4 KiB, `ENOMEM` if the process has too many
    /// mappings, `EACCES` if the file is not open for reading, `ENODEV` if its file system has no mappings, …
    pub fn new(file: BorrowedFd<'_>, at: u64, len: ByteLen) -> Result<Self, Errno> {
        let len = usize::try_from(len.get()).map_err(|_| Errno::new(libc::EOVERFLOW))?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing, and nothing refers to it.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, at) }?;
        Ok(Self { start, len })
    }

    /// Asks for pages of 2 MiB for all that is later read into the page cache, if the file system has them. Pages that
    /// are already there stay as they are.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the kernel has no transparent hugepages.
    pub fn prefer_huge(&self) -> Result<(), Errno> {
        self.advise(Advice::LinuxHugepage)
    }

    /// Reads all of the part into the page cache, in order, and waits for the disk.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the file ends before the mapping does or cannot be read, `EINVAL` before Linux 5.14, `ENOMEM`, …
    pub fn populate(&self) -> Result<(), Errno> {
        self.advise(Advice::LinuxPopulateRead)
    }

    /// Returns the bytes in pages of 2 MiB that were mapped as such, by a fault or by [`populate`](Self::populate).
    ///
    /// # Errors
    ///
    /// `ENOTTY` before Linux 6.7.
    pub fn huge_bytes(&self) -> Result<ByteLen, Errno> {
        let pagemap = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let start = self.start.addr() as u64;
        let end = start + self.len as u64;
        let mut found = 0;
        let mut at = start;
        while at < end {
            let mut regions = [sys::page_region {
                start: 0,
                end: 0,
                categories: 0,
            }; REGIONS];
            let mut scan = sys::pm_scan_arg {
                size: size_of::<sys::pm_scan_arg>() as u64,
                flags: 0,
                start: at,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: REGIONS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: u64::from(sys::PAGE_IS_HUGE),
                category_anyof_mask: 0,
                return_mask: u64::from(sys::PAGE_IS_HUGE),
            };
            // SAFETY: `PAGEMAP_SCAN` reads and writes a `struct pm_scan_arg`.
            let call = unsafe { Updater::<PAGEMAP_SCAN, _>::new(&mut scan) };
            // SAFETY: beside its argument, which lives through the call, this ioctl writes at most `vec_len` entries to
            // `vec`, an array of that length that lives as long and is not read meanwhile. It changes no page, because
            // no flag asks for it.
            unsafe { rustix::ioctl::ioctl(pagemap.as_fd(), call) }?;
            found += regions
                .iter()
                .map(|region| region.end.saturating_sub(region.start))
                .sum::<u64>();
            if scan.walk_end <= at {
                break;
            }
            at = scan.walk_end;
        }
        Ok(ByteLen::new(found))
    }

    /// Returns the `len` bytes from `at` on, both multiples of 4 KiB. `None` if the part is shorter.
    pub fn range(&self, at: u64, len: ByteLen) -> Option<MappedRange<'_>> {
        let into = usize::try_from(at).ok()?;
        let len = usize::try_from(len.get()).ok()?;
        let fits = into.checked_add(len).is_some_and(|end| end <= self.len);
        let aligned = into.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        (fits && aligned && len > 0).then_some(MappedRange { file: self, into, len })
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> ByteLen {
        ByteLen::new(self.len as u64)
    }

    /// Returns `false`: there are no empty mappings.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Unmaps the pages of the part from this process, so that they no longer count as its resident memory. They stay
    /// in the page cache.
    pub fn release(&self) {
        // It can fail only if the mapping is locked, and then it must stay.
        let _ = self.advise(Advice::LinuxDontNeed);
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: exactly the mapped range, of a file and read-only. No advice changes a byte of it; all are about the
        // page cache.
        Ok(unsafe { rustix::mm::madvise(self.start, self.len, advice) }?)
    }
}

/// A part of a [`MappedFile`], for [`Uffd::copy_mapped`](crate::Uffd::copy_mapped).
#[derive(Clone, Copy, Debug)]
pub struct MappedRange<'a> {
    file: &'a MappedFile,
    into: usize,
    /// At least one page.
    len: usize,
}

impl MappedRange<'_> {
    /// Returns `true` if all of it is in the page cache (`mincore(2)`), so that no access waits for a disk. The kernel
    /// always returns `true` if this process neither owns the file nor may write it.
    pub fn is_resident(&self) -> bool {
        self.is_resident_where(|_| true)
    }

    /// Like [`is_resident`](Self::is_resident), for the pages of 4 KiB for whose number `is_needed` returns `true`.
    pub fn is_resident_where(&self, is_needed: impl Fn(usize) -> bool) -> bool {
        let mut pages = [0u8; RESIDENT_PAGES];
        let step = RESIDENT_PAGES * PAGE;
        (0..self.len).step_by(step).all(|from| {
            let len = (self.len - from).min(step);
            // SAFETY: a range of the mapping, and as many bytes as it has pages; no byte of the mapping is touched.
            let answer = unsafe { libc::mincore(self.start().wrapping_byte_add(from), len, pages.as_mut_ptr()) };
            let mut numbered = (from / PAGE..).zip(pages.iter().take(len / PAGE));
            // The other bits are reserved.
            answer == 0 && numbered.all(|(number, page)| page & 1 == 1 || !is_needed(number))
        })
    }

    /// Maps the pages of 4 KiB for whose number `is_needed` returns `true`, and what is in the page cache around them, so that
    /// later accesses are no faults. May wait for the disk if one is not there. Does nothing before Linux 5.14.
    pub fn map_around(&self, is_needed: impl Fn(usize) -> bool) {
        let pages = AROUND / PAGE;
        // The kernel maps all pages around one, in a quarter of the time that it takes for each page.
        for first in (0..self.len / PAGE).step_by(pages) {
            let mut numbers = first..(first + pages).min(self.len / PAGE);
            if let Some(number) = numbers.find(|number| is_needed(*number)) {
                let start = self.start().wrapping_byte_add(number * PAGE);
                // An error leaves the pages to be mapped by accesses.
                // SAFETY: a page of the mapping, which is of a file and read-only.
                let _ = unsafe { rustix::mm::madvise(start, PAGE, Advice::LinuxPopulateRead) };
            }
        }
    }

    /// Reads all of it into the page cache and locks it there (`mlock(2)`), until it is [unlocked](Self::unlock) or the
    /// file is unmapped.
    ///
    /// # Errors
    ///
    /// `EPERM` and `ENOMEM` if `RLIMIT_MEMLOCK` does not allow it (and without `CAP_IPC_LOCK`), `EAGAIN` and `ENOMEM`
    /// if it cannot be read.
    pub fn lock(&self) -> Result<(), Errno> {
        // SAFETY: a range of the mapping. Locking changes no byte of it, and no protection.
        Ok(unsafe { rustix::mm::mlock(self.start(), self.len) }?)
    }

    /// Undoes [`lock`](Self::lock).
    pub fn unlock(&self) {
        // It can fail only for unmapped addresses.
        // SAFETY: a range of the mapping.
        let _ = unsafe { rustix::mm::munlock(self.start(), self.len) };
    }

    /// Unmaps it from this process, with the pages that the kernel has mapped around it. They stay in the page cache,
    /// but no longer count as resident memory of this process.
    pub fn release(&self) {
        let from = self.into / AROUND * AROUND;
        let to = (self.into + self.len).next_multiple_of(AROUND).min(self.file.len);
        // It can fail only if the mapping is locked, and then it must stay.
        // SAFETY: a range of the mapping, which is of a file and read-only: nothing is lost.
        let _ = unsafe {
            rustix::mm::madvise(
                self.file.start.wrapping_byte_add(from),
                to - from,
                Advice::LinuxDontNeed,
            )
        };
    }

    /// Returns the part without its first `skip` bytes, at most `len` long. `None` if nothing is left.
    #[must_use]
    pub fn part(&self, skip: u64, len: ByteLen) -> Option<Self> {
        let into = u64::try_from(self.into).ok()?.checked_add(skip)?;
        let end = self.into + self.len;
        self.file.range(into, len).filter(|part| part.into + part.len <= end)
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> ByteLen {
        ByteLen::new(self.len as u64)
    }

    /// Returns `false`: it has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn start(&self) -> *mut c_void {
        self.file.start.wrapping_byte_add(self.into)
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // It can fail only for unmapped addresses.
        // SAFETY: exactly what was mapped, and nothing refers to it.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const HUGE: u64 = 2 << 20;

    fn file(name: &str, bytes: u64) -> File {
        let path = std::env::temp_dir().join(format!("pagecast-{name}-{}", std::process::id()));
        std::fs::write(&path, vec![7; usize::try_from(bytes).unwrap()]).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    /// A line of `/proc/self/status`, in KiB.
    fn status(field: &str) -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().unwrap()
    }

    #[test]
    fn what_is_populated_is_there_and_large_pages_are_counted() {
        let file = file("populate", 4 * HUGE);
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mapped = MappedFile::new(file.as_fd(), 0, ByteLen::new(4 * HUGE)).unwrap();
        assert_eq!(mapped.huge_bytes().unwrap(), ByteLen::ZERO, "nothing is mapped yet");
        mapped.prefer_huge().unwrap();
        mapped.populate().unwrap();
        let huge = mapped.huge_bytes().unwrap().get();
        if huge == 0 {
            pagecast_testkit::skip::skip("this file system has no large pages");
        }
        assert!(huge.is_multiple_of(HUGE) && huge <= 4 * HUGE, "{huge}");
        let mut byte = [0];
        let read = rustix::io::preadv2(
            &file,
            &mut [std::io::IoSliceMut::new(&mut byte)],
            3 * HUGE,
            rustix::io::ReadWriteFlags::NOWAIT,
        );
        assert_eq!((read, byte), (Ok(1), [7]));
    }

    #[test]
    fn what_is_locked_is_counted_until_it_is_dropped() {
        let file = file("lock", HUGE);
        let mapped = MappedFile::new(file.as_fd(), 0, ByteLen::new(HUGE)).unwrap();
        let before = status("VmLck");
        let all = mapped.range(0, ByteLen::new(HUGE)).unwrap();
        all.lock().unwrap();
        assert_eq!(status("VmLck"), before + (HUGE >> 10));
        all.unlock();
        assert_eq!(status("VmLck"), before);
        all.lock().unwrap();
        drop(mapped);
        assert_eq!(status("VmLck"), before);
    }

    #[test]
    fn a_file_that_is_shorter_is_an_error_and_no_signal() {
        let file = file("short", HUGE);
        let mapped = MappedFile::new(file.as_fd(), 0, ByteLen::new(2 * HUGE)).unwrap();
        assert_eq!(mapped.populate(), Err(Errno::new(libc::EFAULT)));
        assert!(mapped.range(0, ByteLen::new(2 * HUGE)).unwrap().lock().is_err());
        assert!(MappedFile::new(file.as_fd(), 0, ByteLen::ZERO).is_err());
        assert!(MappedFile::new(file.as_fd(), 1, ByteLen::new(HUGE)).is_err());
    }
}
