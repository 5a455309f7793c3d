//! Sidecar files, kept beside a mem-file: a head that identifies the mem-file, a body, and a checksum.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `pagecast` |
//! | 4 | what it is: [`Kind::tag`] |
//! | 4 | version of the format: 2 |
//! | 72 | the [`ContentIdentity`]: device, inode, size in bytes, then mtime, ctime and birth time in seconds and nanoseconds each |
//! | any | the body |
//! | 32 | SHA-256 of all that is before it |
//!
//! All numbers are little-endian. Version 2 is of mem-files only: an image has a digest instead, and takes another version.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use super::content::{ContentIdentity, Says};

const MAGIC: &[u8; 8] = b"pagecast";
const VERSION: u32 = 2;
pub(super) const HEAD: usize = MAGIC.len() + 4 + 4 + ContentIdentity::BYTES;
const CHECKSUM: usize = 32;

/// Permission bits of others than the owner that let them change a file.
const OTHERS_WRITE: u32 = 0o022;

/// Why a file beside a mem-file cannot be used, or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SidecarError {
    /// There is no such file.
    #[error("the file does not exist")]
    Missing,
    /// The file is of another mem-file, of an earlier state of this one, or of another version of the format.
    #[error("it is stale: {how}")]
    Stale {
        /// What differs.
        how: String,
    },
    /// The file was cut off or changed since it was written, or is something else.
    #[error("it is damaged: {what}")]
    Damaged {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file has more bytes than one of this mem-file can have.
    #[error("it has {size} bytes, and the maximum is {most}")]
    TooLarge {
        /// How many bytes it has.
        size: u64,
        /// How many it may have.
        most: u64,
    },
    /// Another user may have written the file.
    #[error("it is not to be trusted: {why}")]
    Untrusted {
        /// Why.
        why: &'static str,
    },
    /// The operating system refused.
    #[error("cannot {what} it")]
    Io {
        /// The operation that failed.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A kind of file that is kept beside mem-files.
pub(super) struct Kind {
    /// The tag in its head.
    pub(super) tag: [u8; 4],
    /// The suffix that follows the name of the mem-file.
    pub(super) suffix: &'static str,
    /// What the file says of the mem-file.
    pub(super) says: Says,
}

impl Kind {
    /// The path of the sidecar file for the mem-file at this path.
    pub(super) fn path(&self, mem_file: &Path) -> PathBuf {
        let mut path = OsString::from(mem_file);
        path.push(self.suffix);
        path.into()
    }

    /// Encodes a file with this body.
    pub(super) fn encode(&self, identity: &ContentIdentity, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + body.len() + CHECKSUM);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.tag);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&identity.to_le_bytes());
        bytes.extend_from_slice(body);
        let checksum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&checksum);
        bytes
    }

    /// Returns the body of a file, if the file is whole and of this mem-file.
    pub(super) fn decode<'a>(&self, identity: &ContentIdentity, bytes: &'a [u8]) -> Result<&'a [u8], SidecarError> {
        let damaged = |what| SidecarError::Damaged { what };
        let (magic, rest) = bytes.split_first_chunk().ok_or(damaged("it is cut off"))?;
        let (tag, rest) = rest.split_first_chunk().ok_or(damaged("it is cut off"))?;
        let (version, _) = rest.split_first_chunk().ok_or(damaged("it is cut off"))?;
        if magic != MAGIC || *tag != self.tag {
            return Err(damaged("it is something else"));
        }
        // Checked before the checksum, which another version may compute differently.
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(SidecarError::Stale {
                how: format!("it has version {version} of the format, not {VERSION}"),
            });
        }
        let (content, checksum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(damaged("it is cut off"))?;
        if Sha256::digest(content).as_slice() != checksum {
            return Err(damaged("its checksum is wrong"));
        }
        let (head, body) = content.split_at_checked(HEAD).ok_or(damaged("it is cut off"))?;
        let (_, of) = head.split_last_chunk().ok_or(damaged("it is cut off"))?;
        let of = ContentIdentity::from_le_bytes(of);
        match of.difference(identity, self.says) {
            Some(how) => Err(SidecarError::Stale { how }),
            None => Ok(body),
        }
    }

    /// Writes a file that only our user can read and write. After a failure or a crash, the file is either whole or as
    /// before.
    pub(super) fn write(&self, path: &Path, identity: &ContentIdentity, body: &[u8]) -> Result<(), SidecarError> {
        let cannot = |source| SidecarError::Io { what: "write", source };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut file = tempfile::Builder::new()
            .prefix(".pagecast-")
            .suffix(self.suffix)
            .tempfile_in(folder)
            .map_err(cannot)?;
        file.write_all(&self.encode(identity, body)).map_err(cannot)?;
        file.as_file().sync_all().map_err(cannot)?;
        file.persist(path).map_err(|error| cannot(error.error))?;
        // Without this a power loss may lose the name, but only the name: the content is whole either way.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

/// Reads a file with a body of at most `most_body` bytes. Refuses a file that users other than ours, root, or `owner`
/// can have written.
pub(super) fn read(path: &Path, most_body: u64, owner: Option<u32>) -> Result<Vec<u8>, SidecarError> {
    let cannot = |what| move |source| SidecarError::Io { what, source };
    // Without O_NONBLOCK, opening a fifo would wait for a writer. Symbolic links may lead to files of other users.
    let file = File::options()
        .read(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed())
        .open(path)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => SidecarError::Missing,
            _ => cannot("open")(error),
        })?;
    let metadata = file.metadata().map_err(cannot("look at"))?;
    if !metadata.is_file() {
        return Err(SidecarError::Damaged {
            what: "it is not a file",
        });
    }
    let ours = rustix::process::geteuid().as_raw();
    if metadata.uid() != ours && metadata.uid() != 0 && Some(metadata.uid()) != owner {
        return Err(SidecarError::Untrusted {
            why: "it belongs to another user",
        });
    }
    if metadata.mode() & OTHERS_WRITE != 0 {
        return Err(SidecarError::Untrusted {
            why: "users other than its owner may write it",
        });
    }
    let most = most_body.saturating_add((HEAD + CHECKSUM) as u64);
    let too_large = |size| SidecarError::TooLarge { size, most };
    if metadata.len() > most {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    let read = file.take(most.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(cannot("read"))?;
    if bytes.len() as u64 > most {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use pagecast_testkit::skip::{Need, skip};

    use super::*;
    use crate::template::KeptIdentity;

    const KIND: Kind = Kind {
        tag: *b"TEST",
        suffix: ".test",
        says: Says::Bytes,
    };

    fn identity_of(path: impl AsRef<Path>) -> ContentIdentity {
        KeptIdentity::of(File::open(path).unwrap()).unwrap().into()
    }

    /// A folder with a mem-file, and its identity.
    fn mem_file() -> (tempfile::TempDir, PathBuf, ContentIdentity) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        std::fs::write(&path, [1; 4096]).unwrap();
        let identity = identity_of(&path);
        (dir, KIND.path(&path), identity)
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else_is_left() {
        let (dir, path, identity) = mem_file();
        for body in [&b"one"[..], b"", b"another"] {
            KIND.write(&path, &identity, body).unwrap();
            let bytes = read(&path, 7, None).unwrap();
            assert_eq!(KIND.decode(&identity, &bytes).unwrap(), body);
        }
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["mem", "mem.test"]);
    }

    #[test]
    fn what_is_of_another_file_or_format_is_stale() {
        let (dir, path, identity) = mem_file();
        KIND.write(&path, &identity, b"body").unwrap();
        let mut bytes = read(&path, 4, None).unwrap();
        std::fs::write(dir.path().join("other"), [1; 4096]).unwrap();
        let other = identity_of(dir.path().join("other"));
        assert!(matches!(KIND.decode(&other, &bytes), Err(SidecarError::Stale { .. })));
        bytes[12] = 1;
        assert!(matches!(
            KIND.decode(&identity, &bytes),
            Err(SidecarError::Stale { .. })
        ));
    }

    #[test]
    fn another_ctime_makes_what_says_bytes_stale_and_advice_not() {
        let (dir, path, identity) = mem_file();
        let mem_path = dir.path().join("mem");
        let changed = std::fs::metadata(&mem_path).unwrap().ctime_nsec();
        // The clock of the file system is coarse.
        while std::fs::metadata(&mem_path).unwrap().ctime_nsec() == changed {
            std::fs::set_permissions(&mem_path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let now = identity_of(&mem_path);
        let advice = Kind {
            says: Says::Advice,
            ..KIND
        };
        KIND.write(&path, &identity, b"body").unwrap();
        let bytes = read(&path, 4, None).unwrap();
        assert!(matches!(KIND.decode(&now, &bytes), Err(SidecarError::Stale { .. })));
        assert_eq!(advice.decode(&now, &bytes).unwrap(), b"body");

        std::fs::write(&mem_path, [2; 4096]).unwrap();
        let written = identity_of(&mem_path);
        assert!(matches!(
            advice.decode(&written, &bytes),
            Err(SidecarError::Stale { .. })
        ));
    }

    #[test]
    fn every_changed_and_every_missing_byte_is_noticed() {
        let (_dir, _, identity) = mem_file();
        let bytes = KIND.encode(&identity, b"body");
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert!(KIND.decode(&identity, &changed).is_err(), "byte {index}");
            assert!(matches!(
                KIND.decode(&identity, &bytes[..index]),
                Err(SidecarError::Damaged { .. })
            ));
        }
        let other = Kind { tag: *b"ELSE", ..KIND };
        assert!(matches!(
            other.decode(&identity, &bytes),
            Err(SidecarError::Damaged { .. })
        ));
    }

    #[test]
    fn what_is_not_there_too_large_or_no_file_is_told_apart() {
        let (dir, path, identity) = mem_file();
        assert!(matches!(read(&path, 4, None), Err(SidecarError::Missing)));
        KIND.write(&path, &identity, b"12345").unwrap();
        assert!(matches!(
            read(&path, 4, None),
            Err(SidecarError::TooLarge { size: 125, most: 124 })
        ));
        assert!(matches!(read(dir.path(), 4, None), Err(SidecarError::Damaged { .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(
            read(&link, 5, None),
            Err(SidecarError::Io { what: "open", .. })
        ));
        let nowhere = dir.path().join("nowhere/mem.test");
        let written = KIND.write(&nowhere, &identity, b"");
        assert!(matches!(written, Err(SidecarError::Io { what: "write", .. })));
    }

    #[test]
    fn what_others_may_write_is_not_trusted() {
        let (_dir, path, identity) = mem_file();
        KIND.write(&path, &identity, b"body").unwrap();
        for (mode, trusted) in [(0o644, true), (0o620, false), (0o602, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let untrusted = matches!(read(&path, 4, None), Err(SidecarError::Untrusted { .. }));
            assert_eq!(untrusted, !trusted, "{mode:o}");
        }
    }

    #[test]
    fn what_another_user_wrote_is_trusted_only_where_the_mem_file_is_theirs() {
        let (_dir, path, identity) = mem_file();
        KIND.write(&path, &identity, b"body").unwrap();
        if std::os::unix::fs::chown(&path, Some(12345), None).is_err() {
            skip((Need::Root, "to give a file away"));
            return;
        }
        assert!(matches!(read(&path, 4, None), Err(SidecarError::Untrusted { .. })));
        assert!(matches!(read(&path, 4, Some(1)), Err(SidecarError::Untrusted { .. })));
        read(&path, 4, Some(12345)).unwrap();
    }
}
