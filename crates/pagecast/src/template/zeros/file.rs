//! The zeros of a mem-file, kept beside it: `MEM-FILE.zeros`.
//!
//! The body of the file, after the head that all such files have (see the module `sidecar`), is a bit for each small page,
//! that of the first page lowest in the first byte, in whole words of 8 bytes: set where the page is zeros.
//!
//! A bit that is wrong would be a wrong byte in a guest. So the map is taken only where nobody but the user we are, root, or
//! the owner of the mem-file can have written it, and kept only where every later write to the mem-file shows in its
//! [`KeptIdentity`]: its ctime must be further back than the clock of its file system is coarse, and nobody may have it open
//! for writing, or mapped, since a write to a page that is dirty already does not change the ctime. A lease tells.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::page::PageSize;
use crate::template::content::Says;
use crate::template::mem_file::sidecar::{self, Kind};
use crate::template::{ContentIdentity, KeptIdentity, MemFile, PageSource, SidecarError, SourceError};

const KIND: Kind = Kind {
    tag: *b"ZERO",
    suffix: ".zeros",
    says: Says::Bytes,
};

/// The clock of a file system that counts time in nanoseconds ticks at least so often, even where the kernel ticks 100
/// times a second.
const FINE_TICK: Duration = Duration::from_millis(50);

/// That of one that counts seconds, or two of them as FAT does.
const COARSE_TICK: Duration = Duration::from_secs(2);

/// Why the zeros of a mem-file were not kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// The mem-file cannot be read, or has changed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It was written so shortly before it was opened that the next write might leave no trace.
    #[error("the mem-file was written just before it was opened")]
    TooFresh,
    /// Somebody may have the mem-file open or mapped for writing: there is no lease on it, or it is broken.
    #[error("there is no lease on the mem-file, so it could be written unnoticed")]
    NotLeased,
    /// The map cannot be written beside it.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
}

impl MemFile {
    /// Where the zeros of the mem-file at this path are kept: beside it.
    pub fn zeros_path_for(mem_file: &Path) -> PathBuf {
        KIND.path(mem_file)
    }

    /// Keeps what is known of the zeros beside the mem-file, for whoever opens it next. For when all have been looked for:
    /// nobody looks again for what this says nothing of. Takes a [lease](Self::lease) on the mem-file, since before the
    /// search. Answers what they are kept for; where that changes, keep them again. Waits for the clock of the file system,
    /// up to 50 ms as a rule, if the mem-file was linked just now.
    ///
    /// # Errors
    ///
    /// [`KeepError`]; then they are found anew next time.
    pub fn keep_zeros(&self) -> Result<ContentIdentity, KeepError> {
        // A page that was read within the tick of the last write may have been written within it once more.
        if !is_old(self.opened_as(), self.opened()) {
            return Err(KeepError::TooFresh);
        }
        // First of all, so that whatever is written later has another identity.
        let identity = *self.state()?.kept();
        // A link of our own may be fresh, but nobody writes as long as there is a lease.
        if !wait_until_old(&identity) {
            return Err(KeepError::TooFresh);
        }
        if !self.is_surely_leased() {
            return Err(KeepError::NotLeased);
        }
        self.check_path()?;
        let content = identity.into();
        KIND.write(&Self::zeros_path_for(self.path()), &content, &self.zeros.to_le_bytes())?;
        Ok(content)
    }

    /// Notes the zeros that were kept, where the mem-file's owner is `owner`.
    pub(in crate::template) fn load_zeros(&self, owner: u32) -> Result<(), SidecarError> {
        let pages = self.len().get() / PageSize::SMALLEST;
        let words = pages.div_ceil(u64::from(u64::BITS));
        if !self.has_sure_leases() {
            // Nobody vouches for its ctime there, and none can have been kept there.
            return Err(SidecarError::Missing);
        }
        let bytes = sidecar::read(&Self::zeros_path_for(self.path()), words * 8, Some(owner))?;
        let body = KIND.decode(&self.content(), &bytes)?;
        if self.zeros.set_le_bytes(body, pages) {
            Ok(())
        } else {
            Err(SidecarError::Damaged {
                what: "it is of a mem-file of another size",
            })
        }
    }
}

/// How often the clock of a file system ticks at least, as far as the ctime tells.
fn tick(identity: &KeptIdentity) -> Duration {
    if identity.is_coarse() { COARSE_TICK } else { FINE_TICK }
}

/// Whether a write at `then` or later gives a file another ctime than it has, and its mtime is not ahead of the clock, which
/// would have been set back since.
fn is_old(identity: &KeptIdentity, then: SystemTime) -> bool {
    let last = identity.changed().max(identity.modified());
    then.duration_since(last).is_ok_and(|age| age > tick(identity))
}

/// Waits for a tick at most; `false` where the clock is wrong.
fn wait_until_old(identity: &KeptIdentity) -> bool {
    if !is_old(identity, SystemTime::now()) {
        std::thread::sleep(tick(identity) + Duration::from_millis(1));
    }
    is_old(identity, SystemTime::now())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::time::SystemTime;

    use pagecast_uffd::ByteLen;

    use super::*;
    use crate::template::{Lease, TemplateOffset};

    const PAGES: u64 = 100;

    fn at(page: u64) -> TemplateOffset {
        TemplateOffset::new(page * PageSize::SMALLEST)
    }

    /// A mem-file of [`PAGES`] pages, every third of which has bytes, written some time ago.
    fn mem_file() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        let file = File::create(&path).unwrap();
        for page in 0..PAGES {
            let byte = u8::from(page % 3 == 0);
            file.write_all_at(&[byte; 4096], page * 4096).unwrap();
        }
        age(&file);
        (dir, path)
    }

    /// Waits until a mem-file is so old that its zeros can be kept.
    fn age(file: &File) {
        let identity = KeptIdentity::of(file).unwrap();
        while !is_old(&identity, SystemTime::now()) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Opened, leased and searched.
    fn found(path: &Path) -> (Arc<MemFile>, Lease) {
        let mem_file = Arc::new(MemFile::open(path).unwrap());
        let lease = mem_file.lease(|| ()).unwrap();
        mem_file.find_zeros(at(0), mem_file.len()).unwrap();
        (mem_file, lease)
    }

    #[test]
    fn zeros_are_found_once_and_known_at_once_from_then_on() {
        let (_dir, path) = mem_file();
        let (searched, lease) = found(&path);
        assert!(matches!(searched.kept_zeros(), Err(SidecarError::Missing)));
        searched.keep_zeros().unwrap();
        drop(lease);
        let opened = MemFile::open(&path).unwrap();
        opened.kept_zeros().unwrap();
        for page in 0..PAGES {
            assert_eq!(opened.zeros().covers(at(page), PageSize::Small.len()), page % 3 != 0);
        }
    }

    #[test]
    fn a_mem_file_that_was_written_since_has_no_kept_zeros() {
        let (_dir, path) = mem_file();
        found(&path).0.keep_zeros().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[1; 4096], 4096).unwrap();
        let opened = MemFile::open(&path).unwrap();
        assert!(matches!(opened.kept_zeros(), Err(SidecarError::Stale { .. })));
        assert_eq!(opened.zeros().known_bytes(), ByteLen::ZERO);
    }

    #[test]
    fn zeros_are_kept_again_for_a_mem_file_that_was_linked_under_its_lease() {
        let (dir, path) = mem_file();
        let (searched, lease) = found(&path);
        let kept = searched.keep_zeros().unwrap();
        std::fs::hard_link(&path, dir.path().join("link")).unwrap();
        // Until then they are those of another file.
        assert!(matches!(
            MemFile::open(&path).unwrap().kept_zeros(),
            Err(SidecarError::Stale { .. })
        ));
        assert_ne!(searched.keep_zeros().unwrap(), kept);
        drop(lease);
        MemFile::open(&path).unwrap().kept_zeros().unwrap();
    }

    #[test]
    fn a_mem_file_overwritten_with_its_mtime_set_back_has_no_kept_zeros() {
        let (_dir, path) = mem_file();
        found(&path).0.keep_zeros().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(&[1; 4096], 4096).unwrap();
        file.set_modified(modified).unwrap();
        let opened = MemFile::open(&path).unwrap();
        assert!(matches!(opened.kept_zeros(), Err(SidecarError::Stale { .. })));
        assert_eq!(opened.zeros().known_bytes(), ByteLen::ZERO);
    }

    #[test]
    fn zeros_of_a_mem_file_that_may_change_meanwhile_are_not_kept() {
        let (dir, path) = mem_file();
        let (searched, lease) = found(&path);
        drop(lease);
        // Whoever writes to a page that they have mapped, and written to before, leaves no trace.
        assert!(matches!(searched.keep_zeros(), Err(KeepError::NotLeased)));
        // Nor are those of one that another has replaced.
        let (searched, _lease) = found(&path);
        std::fs::copy(&path, dir.path().join("copy")).unwrap();
        std::fs::rename(dir.path().join("copy"), &path).unwrap();
        assert!(matches!(searched.keep_zeros(), Err(KeepError::Source(_))));
        assert!(!MemFile::zeros_path_for(&path).exists());
    }

    #[test]
    fn zeros_of_a_mem_file_that_was_just_written_are_not_kept() {
        let (_dir, path) = mem_file();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[2], 0).unwrap();
        // Nor where its mtime is set back.
        file.set_modified(SystemTime::now() - Duration::from_mins(1)).unwrap();
        let opened = MemFile::open(&path).unwrap();
        if opened.opened().duration_since(opened.opened_as().changed()).unwrap() < FINE_TICK {
            assert!(matches!(opened.keep_zeros(), Err(KeepError::TooFresh)));
        }
        age(&file);
        // A clock that was set back must not make it look old.
        file.set_modified(SystemTime::now() + Duration::from_mins(1)).unwrap();
        drop(file);
        let (searched, _lease) = found(&path);
        assert!(matches!(searched.keep_zeros(), Err(KeepError::TooFresh)));
    }

    #[test]
    fn a_damaged_map_is_not_taken_in_part() {
        let (_dir, path) = mem_file();
        found(&path).0.keep_zeros().unwrap();
        let zeros = MemFile::zeros_path_for(&path);
        let mut bytes = std::fs::read(&zeros).unwrap();
        // A bit of page 0, which is not zeros.
        bytes[sidecar::HEAD] |= 1;
        std::fs::write(&zeros, &bytes).unwrap();
        let opened = MemFile::open(&path).unwrap();
        assert!(matches!(opened.kept_zeros(), Err(SidecarError::Damaged { .. })));
        assert_eq!(opened.zeros().known_bytes(), ByteLen::ZERO);
        // Of another size, or with a page past the end, but else sound.
        let mut past_the_end = [0; 16];
        past_the_end[15] = 0x80;
        for body in [&[0xff; 8][..], &past_the_end] {
            KIND.write(&zeros, &opened.content(), body).unwrap();
            let opened = MemFile::open(&path).unwrap();
            assert!(matches!(opened.kept_zeros(), Err(SidecarError::Damaged { .. })));
            assert_eq!(opened.zeros().known_bytes(), ByteLen::ZERO);
        }
    }
}
