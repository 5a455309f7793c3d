//! What the kernel guarantees for a mem-file. That depends on its file system, and on what this process may do with the file.
//!
//! Each fast path is taken only if it is known to be right. Otherwise a slower way is taken that is right everywhere.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Access, AtFlags, CWD};

/// Local file systems that were tried: a lease holds up every writer, and `SEEK_HOLE` tells of no hole where there is data.
///
/// overlayfs is not one: who writes the file in the upper layer, by a path of the host, breaks no lease.
const TRIED: [i64; 4] = [
    0xef53,      // ext4, and ext2 and ext3 of the same number
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0x0102_1994, // tmpfs
];

/// File systems whose pages and attributes come from elsewhere. Numbers of `magic.h` of the kernel, or of the file system's
/// own source.
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

/// The owner of files that belong to nobody in this user namespace, where nothing else is set (`fs.overflowuid`).
const OVERFLOW_USER: u32 = 65_534;

/// What the kernel guarantees for one mem-file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guarantees {
    /// Nobody writes the file while a read lease on it is held. Otherwise a lease holds up some writers only, and the file is
    /// compared all the same.
    pub(super) leases: bool,
    /// `SEEK_HOLE` and `SEEK_DATA` are right, once nothing of the file is dirty. Else all of it is read to find zeros.
    pub(super) holes: bool,
    /// `mincore(2)` tells whether a page is in the page cache. Else a read with `RWF_NOWAIT` is asked.
    pub(super) residency: bool,
    /// The name of the file system, if attributes come from a cache that may be behind. What is read has to be followed by a
    /// question to the server, which may take as long as a read does.
    pub(super) remote: Option<&'static str>,
}

impl Guarantees {
    /// Looks at the file system of `file`, and at who owns the file.
    ///
    /// # Errors
    ///
    /// The file cannot be looked at.
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

/// Whether `mincore(2)` answers this process: the kernel's `can_do_mincore`, but for `CAP_FOWNER`. It says "resident" of
/// every page to all others.
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
