//! Which file a file is, by whatever path it is found.

use std::fmt;
use std::os::fd::AsFd;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

/// Device and inode number: the same for all links, mounts and file descriptors of one file, and for no other file as long
/// as that one exists.
///
/// The device may get another number when the host restarts, so what is persisted holds until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct InodeId {
    /// The device, as `st_dev` has it.
    pub(crate) device: u64,
    /// The number of the inode on that device.
    pub(crate) inode: u64,
}

impl InodeId {
    /// The file that is open as `file`.
    ///
    /// # Errors
    ///
    /// `fstat(2)` fails.
    pub(crate) fn of(file: impl AsFd) -> rustix::io::Result<Self> {
        Ok(Self::of_stat(&rustix::fs::fstat(file)?))
    }

    /// The file that `stat` tells of.
    pub(crate) fn of_stat(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

impl From<(u64, u64)> for InodeId {
    /// From device and inode number.
    fn from((device, inode): (u64, u64)) -> Self {
        Self { device, inode }
    }
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (rustix::fs::major(self.device), rustix::fs::minor(self.device));
        write!(f, "inode {} of device {major}:{minor}", self.inode)
    }
}
