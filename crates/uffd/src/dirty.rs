//! Dirty pages of a file.

use std::os::fd::{AsRawFd, BorrowedFd};

use linux_raw_sys::general as sys;

use crate::outcome::Errno;

/// Size of a page of the page cache in bytes.
const PAGE: u64 = 4096;

/// Returns the bytes of `file` in the page cache that are not yet on its disk (`cachestat(2)`).
///
/// # Errors
///
/// `ENOSYS` before Linux 6.5, `EPERM` if this process neither owns the file nor may write it (Linux 6.14), `EOPNOTSUPP`
/// on hugetlbfs.
pub fn dirty_bytes(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    // Length zero means to the end of the file.
    let range = sys::cachestat_range { off: 0, len: 0 };
    let mut found = sys::cachestat {
        nr_cache: 0,
        nr_dirty: 0,
        nr_writeback: 0,
        nr_evicted: 0,
        nr_recently_evicted: 0,
    };
    // SAFETY: both structures are those of the kernel's ABI and live through the call; it writes to the second only.
    let result = unsafe {
        libc::syscall(
            libc::c_long::from(sys::__NR_cachestat),
            file.as_raw_fd(),
            &raw const range,
            &raw mut found,
            0,
        )
    };
    check(result)?;
    Ok((found.nr_dirty + found.nr_writeback) * PAGE)
}

/// Writes the dirty pages of `file` to its disk and waits for that (`sync_file_range(2)`). Does not write metadata, so
/// the file may not survive a power failure.
///
/// # Errors
///
/// The kernel's, such as `EIO` and `ENOSPC`.
pub fn write_out(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes numbers and touches no memory. No length means to the end of the file.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, all) };
    check(result.into())
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::new(error.raw_os_error().unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_was_just_written_is_dirty_until_it_is_written_out() {
        let path = std::env::temp_dir().join(format!("pagecast-dirty-{}", std::process::id()));
        let mut file = std::fs::File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&vec![7; 1 << 16]).unwrap();
        // Zero on a file system that keeps its pages in memory; an old kernel has no `cachestat`.
        let before = dirty_bytes(file.as_fd());
        assert!(
            matches!(before, Ok(0..=0x1_0000)) || before == Err(Errno::new(libc::ENOSYS)),
            "{before:?}"
        );
        write_out(file.as_fd()).unwrap();
        assert_eq!(dirty_bytes(file.as_fd()), before.map(|_| 0));
    }
}
