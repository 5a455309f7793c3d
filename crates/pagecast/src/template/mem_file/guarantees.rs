//! The guarantees of the kernel for a mem-file. They depend on its file system, and on the permissions of this process.
//!
//! A fast path is taken only if it is known to be right. Otherwise a slower path is taken, which is right everywhere.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Access, AtFlags, CWD};

/// Local file systems that were tested. A lease holds up every writer, and `SEEK_HOLE` reports no hole where there is
/// data.
///
/// overlayfs is not one: a write in the upper layer, by a path of the host, breaks no lease.
const TRIED: [i64; 4] = [
    0xef53,      // ext4, and ext2 and ext3 of the same number
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0x0102_1994, // tmpfs
];

/// File systems whose pages and attributes are remote. The numbers are from `magic.h` of the kernel, or from the source
/// of the file system.
const REMOTE: [(i64, &str); 8] = [
    (0x6969, "NFS"),
    (0x6573_5546, "FUSE"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x0bd0_0bd0, "Lustre"),
];

/// The default owner of files whose user does not exist in this user namespace (`fs.overflowuid`).
const OVERFLOW_USER: u32 = 65_534;

/// The guarantees of the kernel for one mem-file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guarantees {
    /// A read lease holds off every writer of the file. If `false`, it holds off some writers only, and the file is
    /// compared all the same.
    pub(super) leases: bool,
    /// `SEEK_HOLE` and `SEEK_DATA` are right, once no page of the file is dirty. If `false`, finding zeros reads the
    /// whole file.
    pub(super) holes: bool,
    /// `mincore(2)` tells whether a page is in the page cache. If `false`, a read with `RWF_NOWAIT` has to tell.
    pub(super) residency: bool,
    /// The name of the file system, if its attributes come from a cache that may be stale. After a read, its server
    /// must then be asked, which may take as long as a read.
    pub(super) remote: Option<&'static str>,
}

impl Guarantees {
    /// Finds the guarantees, by the file system and the owner of `file`.
    ///
    /// # Errors
    ///
    /// The attributes of the file or of its file system cannot be read.
    pub(super) fn of(file: &File) -> std::io::Result<Self> {
        let magic = rustix::fs::fstatfs(file)?.f_type;
        let was_tried = TRIED.contains(&magic);
        Ok(Self {
            leases: was_tried,
            holes: was_tried,
            residency: owns_or_may_write(file)?,
            remote: REMOTE
                .iter()
                .find(|(number, _)| *number == magic)
                .map(|(_, name)| *name),
        })
    }
}

/// Returns `true` if `mincore(2)` answers this process: the kernel's `can_do_mincore`, without `CAP_FOWNER`. Other
/// processes get "resident" for every page.
fn owns_or_may_write(file: &File) -> std::io::Result<bool> {
    use std::os::fd::AsFd;
    let user = rustix::process::geteuid().as_raw();
    let owns = user != OVERFLOW_USER && file.metadata()?.uid() == user;
    Ok(owns || may_write(file.as_fd()))
}

fn may_write(file: BorrowedFd<'_>) -> bool {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

#[cfg(test)]
mod tests {
    use pagecast_testkit::skip::{Need, skip};

    use super::*;

    #[test]
    fn a_process_that_neither_owns_a_file_nor_may_write_it_is_not_told_what_is_in_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        std::fs::write(&path, [1; 4096]).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let file = File::open(&path).unwrap();
        assert!(Guarantees::of(&file).unwrap().residency);
        if std::os::unix::fs::chown(&path, Some(12_345), None).is_err() {
            return skip((Need::Root, "to give a file away"));
        }
        // A process that may override permissions may write it.
        assert!(Guarantees::of(&file).unwrap().residency);
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::DAC_OVERRIDE);
        sets.effective.remove(rustix::thread::CapabilitySet::FOWNER);
        rustix::thread::set_capabilities(None, sets).unwrap();
        assert!(!Guarantees::of(&file).unwrap().residency);
    }

    #[test]
    fn nothing_is_guaranteed_for_what_is_in_proc() {
        let guarantees = Guarantees::of(&File::open("/proc/self/status").unwrap()).unwrap();
        assert!(!guarantees.leases && !guarantees.holes);
    }
}
