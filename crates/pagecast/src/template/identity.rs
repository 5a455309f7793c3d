//! What makes a file the file it was.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// The identity of a mem-file: the same file, not written since.
///
/// Not its `ctime`, which also changes with links and permissions, and those may come and go while forks live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Identity {
    /// The identity that `metadata` tells of.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }

    /// The identity that `fstat(2)` tells of.
    #[cfg(target_os = "linux")]
    pub(super) fn of_stat(stat: &rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            // Neither is negative: no file has fewer than no bytes, nor fewer than no nanoseconds.
            size: stat.st_size.unsigned_abs(),
            modified_s: stat.st_mtime,
            modified_ns: i64::try_from(stat.st_mtime_nsec).unwrap_or_default(),
        }
    }

    /// How many bytes [`to_le_bytes`](Self::to_le_bytes) makes.
    #[cfg(target_os = "linux")]
    pub(super) const BYTES: usize = 40;

    /// Its five numbers, little-endian, in the order in which they are declared.
    #[cfg(target_os = "linux")]
    pub(super) fn to_le_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let numbers = [
            self.device.to_le_bytes(),
            self.inode.to_le_bytes(),
            self.size.to_le_bytes(),
            self.modified_s.to_le_bytes(),
            self.modified_ns.to_le_bytes(),
        ];
        bytes.copy_from_slice(numbers.as_flattened());
        bytes
    }

    /// What [`to_le_bytes`](Self::to_le_bytes) was made of.
    #[cfg(target_os = "linux")]
    pub(super) fn from_le_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let mut numbers = bytes.as_chunks().0.iter().copied();
        let mut next = || numbers.next().unwrap_or_default();
        Self {
            device: u64::from_le_bytes(next()),
            inode: u64::from_le_bytes(next()),
            size: u64::from_le_bytes(next()),
            modified_s: i64::from_le_bytes(next()),
            modified_ns: i64::from_le_bytes(next()),
        }
    }

    /// Device and inode number.
    pub fn inode(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// When it was last written, as the file system says.
    pub fn modified(&self) -> SystemTime {
        let seconds = Duration::from_secs(self.modified_s.unsigned_abs());
        let nanos = Duration::from_nanos(self.modified_ns.unsigned_abs());
        if self.modified_s >= 0 {
            SystemTime::UNIX_EPOCH + seconds + nanos
        } else {
            SystemTime::UNIX_EPOCH - seconds + nanos
        }
    }

    /// In what `now` differs, in words; `None` where it does not.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.inode() != now.inode() {
            Some(format!(
                "another file is in its place (device and inode {:?}, was {:?})",
                now.inode(),
                self.inode()
            ))
        } else if self.size != now.size {
            Some(format!("it has {} bytes, had {}", now.size, self.size))
        } else if self != now {
            Some("it was written".to_owned())
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn writing_truncating_and_replacing_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        std::fs::write(&path, [1; 8192]).unwrap();
        let identity = || Identity::of(&std::fs::metadata(&path).unwrap());
        let before = identity();
        assert_eq!(before.difference(&identity()), None);

        let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all(&[2]).unwrap();
        // Time stamps have a granularity; this says "later" without waiting for it.
        file.set_modified(before.modified() + Duration::from_secs(1)).unwrap();
        assert!(before.difference(&identity()).unwrap().contains("written"));

        file.set_len(4096).unwrap();
        assert!(before.difference(&identity()).unwrap().contains("4096 bytes"));

        let other = dir.path().join("other");
        std::fs::write(&other, [1; 8192]).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(before.difference(&identity()).unwrap().contains("another file"));
    }
}
