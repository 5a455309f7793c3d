//! The identity of a file, independent of its path.

use std::fmt;
use std::os::fd::AsFd;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

/// Device and inode number: the same for all links, mounts and file descriptors of one file. No other file has them
/// while that file exists.
///
/// The device number may change when the host restarts, so a saved identity is valid until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct InodeId {
    /// The device, as `st_dev` has it.
    pub(crate) device: u64,
    /// The number of the inode on that device.
    pub(crate) inode: u64,
}

impl InodeId {
    /// Returns the identity of the open file `file`.
    ///
    /// # Errors
    ///
    /// `fstat(2)` fails.
    pub(crate) fn of(file: impl AsFd) -> rustix::io::Result<Self> {
        Ok(Self::of_stat(&rustix::fs::fstat(file)?))
    }

    /// Returns the identity of the file that `stat` describes.
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
