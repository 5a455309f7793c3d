//! The zeros of a mem-file, kept beside it: `MEM-FILE.zeros`.
//!
//! The body follows the head that all such files have (see the module `sidecar`). It has one bit for each small
//! page, set if the page is zeros. The bit of the first page is the lowest of the first byte. The length is a multiple
//! of 8 bytes.
//!
//! A wrong bit would be a wrong byte in a guest. So the map is used only if no user but ours, root, or the owner of the
//! mem-file can have written it. It is kept only if every later write to the mem-file changes its [`KeptIdentity`]. For
//! this, the ctime must be older than one tick of the clock of its file system. Nor may a process have the file open or
//! mapped for writing: a write to a dirty page does not change the ctime. A lease rules that out.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::MemFile;
use crate::page::PageSize;
use crate::template::content::Says;
use crate::template::sidecar::{self, Kind};
use crate::template::{ContentIdentity, KeptIdentity, PageSource, SidecarError, SourceError};

const KIND: Kind = Kind {
    tag: *b"ZERO",
    suffix: ".zeros",
    says: Says::Bytes,
};

/// An upper bound of the clock tick of a file system with nanosecond time stamps, even if the kernel ticks only 100
/// times a second.
const FINE_TICK: Duration = Duration::from_millis(50);

/// The same for time stamps in seconds, or in units of two seconds as on FAT.
const COARSE_TICK: Duration = Duration::from_secs(2);

/// Why the zeros of a mem-file were not kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// The mem-file cannot be read, or has changed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The mem-file was opened so soon after a write that the next write might leave no trace.
    #[error("the mem-file was written just before it was opened")]
    TooFresh,
    /// The mem-file may be open or mapped for writing: it has no lease, or a broken one.
    #[error("there is no lease on the mem-file, so it could be written unnoticed")]
    NotLeased,
    /// The map cannot be written beside it.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
}

impl MemFile {
    /// The path of the kept zeros of this mem-file: beside it.
    pub fn zeros_path_for(mem_file: &Path) -> PathBuf {
        KIND.path(mem_file)
    }

    /// Writes the known zeros beside the mem-file, for the next process that opens it. Call after the whole search:
    /// pages missing from this file are not searched again. Needs a [lease](Self::lease) on the mem-file, taken before
    /// the search. Returns the identity that the zeros are kept for; if that changes, keep them again. Waits for the
    /// clock of the file system, usually up to 50 ms, if the mem-file was linked just now.
    ///
    /// # Errors
    ///
    /// [`KeepError`]; the next process then has to search.
    pub fn keep_zeros(&self) -> Result<ContentIdentity, KeepError> {
        // A page read within the tick of the last write may have been written again within the same tick.
        if !is_old(self.opened_as(), self.opened()) {
            return Err(KeepError::TooFresh);
        }
        // Taken first, so that every later write changes the identity.
        let identity = *self.state()?.kept();
        // Our own link may be fresh, but no process writes as long as there is a lease.
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

    /// Loads the kept zeros. `owner` is the owner of the mem-file.
    pub(super) fn load_zeros(&self, owner: u32) -> Result<(), SidecarError> {
        let pages = self.len().get() / PageSize::SMALLEST;
        let words = pages.div_ceil(u64::from(u64::BITS));
        if !self.has_sure_leases() {
            // The ctime cannot be relied upon there, and no map can have been kept.
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

/// An upper bound of the clock tick of a file system, as far as the ctime shows.
fn tick(identity: &KeptIdentity) -> Duration {
    if identity.is_coarse() { COARSE_TICK } else { FINE_TICK }
}

/// Returns `true` if a write at `then` or later changes the ctime of the file. Returns `false` if the mtime is ahead of
/// the clock, which would have been set back since.
fn is_old(identity: &KeptIdentity, then: SystemTime) -> bool {
    let last = identity.changed().max(identity.modified());
    then.duration_since(last).is_ok_and(|age| age > tick(identity))
}

/// Waits for a tick at most. Returns `false` if the clock is wrong.
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

    /// A mem-file of [`PAGES`] pages, written some time ago. Every third page has bytes.
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

    /// Waits until a mem-file is old enough for its zeros to be kept.
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
        // Until then the zeros are those of another file.
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
        // A write to a mapped page that was written to before leaves no trace.
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
        // Nor if its mtime is set back.
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
