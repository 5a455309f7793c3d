//! Identity of a file: which file it is, and whether it has changed.
//!
//! | type | for | has beside device, inode, size and mtime |
//! | --- | --- | --- |
//! | [`Identity`] | naming a file that is held | nothing |
//! | [`KeptIdentity`] | data of a file that is kept: beside it, and in a run dir | ctime and birth time, which user space cannot set |
//! | [`FileState`] | telling a write from a link or a `chmod`, both of which change the ctime | that, links, permissions, owner and flags |

use std::fs::Metadata;
#[cfg(target_os = "linux")]
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

#[cfg(target_os = "linux")]
use rustix::fs::{AtFlags, Statx, StatxFlags};
use serde::{Deserialize, Serialize};

/// The identity of a mem-file: equal if it is the same file, with the same size and mtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Identity {
    /// Returns the identity in `metadata`.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }

    /// Returns the identity in a result of `fstat(2)`.
    #[cfg(target_os = "linux")]
    pub(super) fn of_stat(stat: &rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            // Neither is negative: a file has at least zero bytes, and a time stamp at least zero nanoseconds.
            size: stat.st_size.unsigned_abs(),
            modified_s: stat.st_mtime,
            modified_ns: i64::try_from(stat.st_mtime_nsec).unwrap_or_default(),
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

    /// The mtime: when the file was last written, as its file system says. Its owner can set it.
    pub fn modified(&self) -> SystemTime {
        time(self.modified_s, self.modified_ns)
    }

    /// Describes how `now` differs. `None` if it does not.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.inode() != now.inode() {
            Some(format!(
                "it was replaced by another file (device and inode {:?}, was {:?})",
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

/// Converts a time stamp of a file system.
fn time(seconds: i64, nanos: i64) -> SystemTime {
    let since = Duration::from_secs(seconds.unsigned_abs());
    let nanos = Duration::from_nanos(nanos.unsigned_abs());
    let whole = if seconds >= 0 {
        SystemTime::UNIX_EPOCH.checked_add(since)
    } else {
        SystemTime::UNIX_EPOCH.checked_sub(since)
    };
    whole
        .and_then(|whole| whole.checked_add(nanos))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The identity of a mem-file for data that is used after the file was closed. Includes its ctime, and its birth time
/// if the file system has one.
///
/// Only the kernel sets these two. So a file that was overwritten, and had its mtime set back (`cp -p`, `tar`,
/// `rsync -t --inplace`), has another identity. A link or a `chmod` changes the ctime as well.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptIdentity {
    #[serde(flatten)]
    file: Identity,
    changed_s: i64,
    changed_ns: i64,
    /// Seconds and nanoseconds.
    born: Option<(i64, i64)>,
}

#[cfg(target_os = "linux")]
impl KeptIdentity {
    /// The length of [`to_le_bytes`](Self::to_le_bytes) in bytes.
    pub(super) const BYTES: usize = 72;

    /// The nanoseconds of the birth time if there is none.
    const NOT_BORN: i64 = -1;

    /// Returns the identity of the open file `file`.
    ///
    /// # Errors
    ///
    /// `statx(2)` fails.
    pub fn of(file: impl AsFd) -> std::io::Result<Self> {
        FileState::of(file, Look::Now).map(|state| state.kept)
    }

    /// Its nine numbers, little-endian, in the order of their declaration.
    pub(super) fn to_le_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let born = self.born.unwrap_or((0, Self::NOT_BORN));
        let numbers = [
            self.file.device.to_le_bytes(),
            self.file.inode.to_le_bytes(),
            self.file.size.to_le_bytes(),
            self.file.modified_s.to_le_bytes(),
            self.file.modified_ns.to_le_bytes(),
            self.changed_s.to_le_bytes(),
            self.changed_ns.to_le_bytes(),
            born.0.to_le_bytes(),
            born.1.to_le_bytes(),
        ];
        bytes.copy_from_slice(numbers.as_flattened());
        bytes
    }

    /// Decodes [`to_le_bytes`](Self::to_le_bytes).
    pub(super) fn from_le_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let mut numbers = bytes.as_chunks().0.iter().copied();
        let mut next = || numbers.next().unwrap_or_default();
        let file = Identity {
            device: u64::from_le_bytes(next()),
            inode: u64::from_le_bytes(next()),
            size: u64::from_le_bytes(next()),
            modified_s: i64::from_le_bytes(next()),
            modified_ns: i64::from_le_bytes(next()),
        };
        let changed = (i64::from_le_bytes(next()), i64::from_le_bytes(next()));
        let born = (i64::from_le_bytes(next()), i64::from_le_bytes(next()));
        Self {
            file,
            changed_s: changed.0,
            changed_ns: changed.1,
            born: (born.1 != Self::NOT_BORN).then_some(born),
        }
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.file.size
    }

    /// The mtime: when the file was last written, as its file system says. Its owner can set it.
    pub fn modified(&self) -> SystemTime {
        self.file.modified()
    }

    /// The ctime: when the file was last written or linked, or its permissions changed.
    pub fn changed(&self) -> SystemTime {
        time(self.changed_s, self.changed_ns)
    }

    /// Returns `true` if the file system seems to count the ctime in whole seconds.
    pub(super) fn is_coarse(&self) -> bool {
        self.changed_ns == 0
    }

    /// Describes how `now` differs. `None` if it does not.
    pub fn difference(&self, now: &Self) -> Option<String> {
        self.difference_but_ctime(now).or_else(|| {
            (self != now).then(|| "its ctime differs: it may have been written, and its mtime set back".to_owned())
        })
    }

    /// Like [`difference`](Self::difference), but ignores the ctime.
    pub(super) fn difference_but_ctime(&self, now: &Self) -> Option<String> {
        self.file.difference(&now.file).or_else(|| {
            (self.born != now.born).then(|| "it was replaced by another file, with another birth time".to_owned())
        })
    }
}

/// How current attributes must be on a file system that caches them (NFS, FUSE). Other file systems always return the
/// current ones.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Attributes from the cache, without waiting for a server.
    Cached,
    /// Current attributes. May wait for a server.
    Now,
}

/// The result of `statx(2)` for a mem-file: what a write changes, and what else changes its ctime.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    #[serde(flatten)]
    kept: KeptIdentity,
    links: u32,
    mode: u16,
    user: u32,
    group: u32,
    /// `stx_attributes`: the immutable flag and the like.
    flags: u64,
}

#[cfg(target_os = "linux")]
impl FileState {
    pub(super) fn of(file: impl AsFd, look: Look) -> std::io::Result<Self> {
        let sync = match look {
            Look::Cached => AtFlags::STATX_DONT_SYNC,
            Look::Now => AtFlags::STATX_FORCE_SYNC,
        };
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let statx = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH | sync, wanted)?;
        Ok(Self::of_statx(&statx))
    }

    fn of_statx(statx: &Statx) -> Self {
        let has_birth_time = StatxFlags::from_bits_retain(statx.stx_mask).contains(StatxFlags::BTIME);
        Self {
            kept: KeptIdentity {
                file: Identity {
                    device: rustix::fs::makedev(statx.stx_dev_major, statx.stx_dev_minor),
                    inode: statx.stx_ino,
                    size: statx.stx_size,
                    modified_s: statx.stx_mtime.tv_sec,
                    modified_ns: statx.stx_mtime.tv_nsec.into(),
                },
                changed_s: statx.stx_ctime.tv_sec,
                changed_ns: statx.stx_ctime.tv_nsec.into(),
                born: has_birth_time.then_some((statx.stx_btime.tv_sec, statx.stx_btime.tv_nsec.into())),
            },
            links: statx.stx_nlink,
            mode: statx.stx_mode,
            user: statx.stx_uid,
            group: statx.stx_gid,
            flags: statx.stx_attributes.bits(),
        }
    }

    /// The identity, without the ctime.
    pub fn identity(&self) -> &Identity {
        &self.kept.file
    }

    /// The identity, with the ctime.
    pub(super) fn kept(&self) -> &KeptIdentity {
        &self.kept
    }

    /// The ctime as one number, for comparison.
    pub(super) fn ctime(&self) -> i64 {
        ctime_in_one(self.kept.changed_s, self.kept.changed_ns)
    }

    /// Describes how the file was written since, if its state is `now`. `None` if it was not. `is_explained` if another
    /// cause of the new ctime is known.
    pub fn written(&self, now: &Self, is_explained: bool) -> Option<String> {
        match self.change(now) {
            Change::Written(how) => Some(how),
            Change::Unexplained if !is_explained => {
                Some("it was written, and its mtime set back: its ctime has changed without another reason".to_owned())
            }
            Change::None | Change::Metadata | Change::Unexplained => None,
        }
    }

    fn change(&self, now: &Self) -> Change {
        if let Some(how) = self.kept.difference_but_ctime(&now.kept) {
            return Change::Written(how);
        }
        if self.kept == now.kept {
            return Change::None;
        }
        let without_ctime = |state: &Self| (state.links, state.mode, state.user, state.group, state.flags);
        if without_ctime(self) == without_ctime(now) {
            Change::Unexplained
        } else {
            Change::Metadata
        }
    }
}

/// How a file has changed.
#[cfg(target_os = "linux")]
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    /// Nothing differs.
    None,
    /// The links, owner, permissions or flags differ, which explains the ctime.
    Metadata,
    /// Only the ctime differs, without an explanation: the file may have been written, and its mtime set back.
    Unexplained,
    /// The file was written, or is another file.
    Written(String),
}

/// Seconds and nanoseconds as one number, unique for each moment of some centuries.
#[cfg(target_os = "linux")]
fn ctime_in_one(seconds: i64, nanos: i64) -> i64 {
    seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos)
}

/// The ctime in a result of `fstat(2)`, as [`FileState::ctime`].
#[cfg(target_os = "linux")]
pub(super) fn ctime_of_stat(stat: &rustix::fs::Stat) -> i64 {
    ctime_in_one(stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or_default())
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

    #[cfg(target_os = "linux")]
    mod linux {
        use std::fs::{File, Permissions};
        use std::os::unix::fs::{FileExt, PermissionsExt};

        use super::super::*;

        fn file() -> (tempfile::TempDir, File) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("mem");
            std::fs::write(&path, [1; 8192]).unwrap();
            let file = File::options().read(true).write(true).open(path).unwrap();
            (dir, file)
        }

        fn state(file: &File) -> FileState {
            FileState::of(file, Look::Now).unwrap()
        }

        /// Waits until another change has another ctime.
        fn tick(file: &File) {
            let changed = state(file).kept.changed();
            while !changed.elapsed().is_ok_and(|age| age > Duration::from_millis(50)) {
                std::thread::yield_now();
            }
        }

        #[test]
        fn a_file_overwritten_with_its_mtime_set_back_is_told_from_one_that_was_linked_or_whose_mode_changed() {
            let (dir, file) = file();
            tick(&file);
            let before = state(&file);
            assert_eq!(before.change(&state(&file)), Change::None);

            std::fs::hard_link(dir.path().join("mem"), dir.path().join("link")).unwrap();
            let linked = state(&file);
            assert_eq!(before.change(&linked), Change::Metadata);
            assert!(before.kept.difference(&linked.kept).unwrap().contains("ctime"));
            tick(&file);
            file.set_permissions(Permissions::from_mode(0o400)).unwrap();
            let protected = state(&file);
            assert_eq!(linked.change(&protected), Change::Metadata);

            tick(&file);
            file.write_all_at(&[2], 0).unwrap();
            file.set_modified(before.identity().modified()).unwrap();
            let written = state(&file);
            assert_eq!(written.identity().difference(before.identity()), None);
            assert_eq!(protected.change(&written), Change::Unexplained);
            tick(&file);
            file.write_all_at(&[3], 0).unwrap();
            assert!(matches!(written.change(&state(&file)), Change::Written(_)));
        }

        #[test]
        fn the_kept_identity_is_the_same_after_it_was_written_down() {
            let (_dir, file) = file();
            let kept = KeptIdentity::of(&file).unwrap();
            for kept in [kept, KeptIdentity { born: None, ..kept }] {
                assert_eq!(KeptIdentity::from_le_bytes(&kept.to_le_bytes()), kept);
            }
            let state = state(&file);
            let json = serde_json::to_string(&state).unwrap();
            assert_eq!(serde_json::from_str::<FileState>(&json).unwrap(), state);
        }
    }
}
