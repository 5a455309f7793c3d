//! The memory file of a paused microVM, on a local file system.

mod guarantees;
mod kept_zeros;
mod lease;
mod lease_trust;
mod page_cache;
mod resident_blocks;

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use pagecast_uffd::{ByteLen, MappedFile, MappedRange, dirty};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::{Errno as E, ReadWriteFlags};

use self::guarantees::Guarantees;
pub use self::kept_zeros::KeepError;
pub use self::lease::{Lease, LeaseError};
use self::lease_trust::LeaseTrust;
pub use self::page_cache::{Loader, LockError, Locked, Wanted};
use self::resident_blocks::ResidentBlocks;
use super::content::ContentIdentity;
use super::identity::{FileState, Identity, KeptIdentity, Look, ctime_of_stat};
use super::open::OpenError;
use super::run::TemplateOffset;
use super::sidecar::SidecarError;
use super::source::{MappedPages, Page, PageSource, Residency, SourceError};
use super::zeros::{ZeroMap, is_zero};
use crate::page::PageSize;

/// The most runs of data whose holes are looked for when a file is opened. If there are more, the rest is left to the
/// search for zeros. Each run costs two `lseek`, so this bounds how long opening takes (some milliseconds).
const MOST_EXTENTS: usize = 4096;

/// How many bytes are read at once to find zeros.
const SCAN_BYTES: usize = 1 << 20;

/// The most dirty bytes that are written to the disk when a file is opened, so that its holes can be relied upon at
/// once. If more are dirty, the holes are left to the search for zeros.
const MOST_WRITTEN_OUT: u64 = 64 << 20;

/// `RWF_DONTCACHE` (Linux 6.14): pages that a read brings into the page cache do not stay there; others do.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// A mem-file: opened once, read-only, and kept open, so that renaming or replacing the path changes nothing for forks.
///
/// Bytes come from `preadv2(RWF_NOWAIT)`, which reads from the page cache or fails at once. Unlike a mapping, it can
/// neither stall the fault path on a disk nor kill the server if the file is truncated.
#[derive(Debug)]
pub struct MemFile {
    path: PathBuf,
    file: File,
    guarantees: Guarantees,
    /// The state of the file when it was opened.
    opened_as: FileState,
    /// The state of the file when it was last found unchanged. Its links and permissions may change.
    seen: Mutex<FileState>,
    /// The ctime of `seen`, for the fault path.
    seen_ctime: AtomicI64,
    /// Whether its holes are relied upon, once that is known.
    holes: OnceLock<bool>,
    zeros: ZeroMap,
    /// `Ok` if the zeros of an earlier search were loaded; otherwise why not.
    kept_zeros: OnceLock<Result<(), SidecarError>>,
    opened: SystemTime,
    /// There is a [`Lease`](super::Lease) on it.
    leased: AtomicBool,
    /// That lease holds off every writer, and the file did not change between its opening and the lease.
    unwritten: AtomicBool,
    /// Whether the lease proves that the file is unchanged.
    lease_trust: LeaseTrust,
    /// The whole file, for runs of pages and for pages locked in memory.
    mapped: Option<Arc<MappedFile>>,
    /// All of the file but zeros is locked in memory.
    pinned: AtomicBool,
    /// If it is not, these parts of the file are known to be in memory.
    blocks: Option<ResidentBlocks>,
}

impl MemFile {
    /// Opens the file at `path` and finds its holes. Loads all other zeros if a map of them is [kept](Self::kept_zeros)
    /// beside it.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the file cannot be a template.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let cannot_open = |source| OpenError::Io {
            path: path.to_owned(),
            source,
        };
        // Without O_NONBLOCK, opening a fifo would wait for a writer.
        let file = File::options()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(cannot_open)?;
        let metadata = file.metadata().map_err(cannot_open)?;
        if !metadata.is_file() {
            let kind = metadata.file_type();
            return Err(OpenError::NotAFile {
                path: path.to_owned(),
                what: match () {
                    () if kind.is_dir() => "a directory",
                    () if kind.is_fifo() => "a fifo",
                    () if kind.is_socket() => "a socket",
                    () if kind.is_block_device() => "a block device",
                    () => "a device",
                },
            });
        }
        let guarantees = Guarantees::of(&file).map_err(cannot_open)?;
        // Taken before any byte or hole is read.
        let opened_as = FileState::of(&file, Look::Now).map_err(cannot_open)?;
        let size = opened_as.identity().size();
        if size == 0 || !PageSize::Small.is_aligned(size) {
            return Err(OpenError::Size {
                path: path.to_owned(),
                size,
            });
        }
        let zeros = ZeroMap::new(ByteLen::new(size));
        let holes = OnceLock::new();
        if !guarantees.holes {
            let _ = holes.set(false);
        } else if is_written_out(&file) {
            let _ = holes.set(true);
            find_holes(&file, size, &zeros).map_err(cannot_open)?;
        }
        // Some file systems have no mappings. Runs of pages are then read like single pages.
        let mapped = MappedFile::new(file.as_fd(), 0, ByteLen::new(size)).ok().map(Arc::new);
        // Blocks ask which pages are in the page cache.
        let blocks = guarantees
            .residency
            .then(|| ResidentBlocks::new(file.as_fd(), ByteLen::new(size)))
            .flatten();
        let mem_file = Self {
            path: path.to_owned(),
            file,
            guarantees,
            opened_as,
            seen: Mutex::new(opened_as),
            seen_ctime: AtomicI64::new(opened_as.ctime()),
            holes,
            zeros,
            kept_zeros: OnceLock::new(),
            opened: SystemTime::now(),
            leased: AtomicBool::new(false),
            unwritten: AtomicBool::new(false),
            lease_trust: LeaseTrust::new(),
            mapped,
            pinned: AtomicBool::new(false),
            blocks,
        };
        mem_file.kept_zeros.get_or_init(|| mem_file.load_zeros(metadata.uid()));
        Ok(mem_file)
    }

    /// Succeeds if all zeros were known when the file was opened, from a map kept beside it. Otherwise the error says
    /// why not, and the zeros have to be searched for.
    ///
    /// # Errors
    ///
    /// [`SidecarError`]; [`Missing`](SidecarError::Missing) the first time.
    pub fn kept_zeros(&self) -> Result<(), &SidecarError> {
        self.kept_zeros
            .get()
            .map_or(Err(&SidecarError::Missing), |kept| kept.as_ref().copied())
    }

    /// When it was opened.
    fn opened(&self) -> SystemTime {
        self.opened
    }

    /// The path that the file was opened at. It may lead elsewhere by now; see [`check_path`](Self::check_path).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The identity of the file.
    pub fn identity(&self) -> &Identity {
        self.opened_as.identity()
    }

    /// The identity of the content when the file was opened. Data kept then belongs to it.
    pub fn content(&self) -> ContentIdentity {
        (*self.opened_as()).into()
    }

    /// The identity of the file when it was opened.
    fn opened_as(&self) -> &KeptIdentity {
        self.opened_as.kept()
    }

    /// Checks that this is still the file that was opened, unchanged, and returns its current state. Links and
    /// permissions may differ. Unlike [`check_unchanged`](PageSource::check_unchanged), this always examines the file,
    /// and waits for a file server.
    ///
    /// # Errors
    ///
    /// [`SourceError`].
    pub fn state(&self) -> Result<FileState, SourceError> {
        self.look(Look::Now)
    }

    /// Accepts the current ctime as that of an unchanged file. Call right after this process has linked the file or
    /// changed its permissions, since a later change might hide that.
    ///
    /// # Errors
    ///
    /// [`SourceError`] if the file was written all the same.
    pub fn accept_own_change(&self) -> Result<FileState, SourceError> {
        let mut seen = self.seen();
        let now = self.look_at_file(Look::Now)?;
        if let Some(how) = seen.written(&now, true) {
            return Err(SourceError::Changed { how });
        }
        Ok(self.note_seen(&mut seen, now))
    }

    /// The name of its file system, if its pages come from elsewhere.
    pub fn remote(&self) -> Option<&'static str> {
        self.guarantees.remote
    }

    fn look(&self, look: Look) -> Result<FileState, SourceError> {
        // Locked while the file is examined, so that a later state is noted later.
        let mut seen = self.seen();
        let now = self.look_at_file(look)?;
        // Evaluated only if no other change explains the ctime.
        let is_explained = seen.written(&now, false).is_some() && (self.is_surely_leased() || self.was_renamed());
        if let Some(how) = seen.written(&now, is_explained) {
            return Err(SourceError::Changed { how });
        }
        Ok(self.note_seen(&mut seen, now))
    }

    fn look_at_file(&self, look: Look) -> Result<FileState, SourceError> {
        FileState::of(&self.file, look).map_err(Self::io_error(TemplateOffset::new(0)))
    }

    fn note_seen(&self, seen: &mut FileState, now: FileState) -> FileState {
        *seen = now;
        self.seen_ctime.store(now.ctime(), Ordering::Relaxed);
        now
    }

    fn seen(&self) -> MutexGuard<'_, FileState> {
        // No code that can panic runs under this lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `true` if the path leads elsewhere by now.
    fn was_renamed(&self) -> bool {
        match std::fs::metadata(&self.path) {
            Ok(there) => Identity::of(&there).inode() != self.identity().inode(),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        }
    }

    /// Checks that the file is unchanged. Call after its bytes were read and before they are used.
    fn check_now(&self) -> Result<(), SourceError> {
        if self.lease_trust.holds() {
            return Ok(());
        }
        self.look(Look::Now).map(drop)
    }

    /// Returns `true` if the holes of the file are relied upon. May wait for the disk.
    fn holes_are_believed(&self) -> bool {
        let written =
            || rustix::fs::fdatasync(&self.file).is_ok() && dirty_bytes(&self.file).is_none_or(|bytes| bytes == 0);
        *self.holes.get_or_init(written)
    }

    /// Checks that the path still leads to this file, unchanged. Served forks do not depend on that, since the file is
    /// open. A new fork should get the file that is there now.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`]; [`SourceError::Io`] if the check itself failed.
    pub fn check_path(&self) -> Result<(), SourceError> {
        let now = std::fs::metadata(&self.path).map_err(|error| match error.kind() {
            // The path leads to nothing. A retry would fail in the same way.
            ErrorKind::NotFound | ErrorKind::NotADirectory => SourceError::Changed {
                how: format!("its path cannot be checked: {error}"),
            },
            _ => Self::io_error(TemplateOffset::new(0))(error),
        })?;
        match self.identity().difference(&Identity::of(&now)) {
            Some(how) => Err(SourceError::Changed { how }),
            None => Ok(()),
        }
    }

    /// Fills `buffer` like [`read`](PageSource::read), but leaves the page cache as it is, if the kernel and the file
    /// system can. Otherwise a search of the whole template would evict pages that are read often.
    fn read_past_cache(&self, at: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let offset = at.get().saturating_add(filled as u64);
            match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(rest)], offset, DONTCACHE) {
                Ok(read) if read > 0 => filled += read,
                // The end of the file, or no support in the kernel or the file system. `read` tells which.
                _ => return self.read(at, buffer),
            }
        }
        Ok(())
    }

    /// Returns `true` if all of the file but zeros is [locked](super::Locked) in memory.
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// Notes whether all of the file but zeros is locked in memory. Call with `false` before unlocking it. Faults are
    /// then answered straight from the mapping, as long as there is a [`Lease`](super::Lease).
    pub fn set_pinned(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Relaxed);
    }

    fn io_error(at: TemplateOffset) -> impl FnOnce(std::io::Error) -> SourceError {
        move |source| SourceError::Io { at, source }
    }
}

impl AsFd for MemFile {
    /// The open file, wherever its path leads by now: to link or examine exactly this file.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PageSource for MemFile {
    fn len(&self) -> ByteLen {
        ByteLen::new(self.identity().size())
    }

    fn try_read<'a>(&'a self, at: TemplateOffset, buffer: &'a mut [u8]) -> Result<Page<'a>, SourceError> {
        let len = ByteLen::of_slice(buffer);
        if self.zeros.covers(at, len) {
            return Ok(Page::Zero);
        }
        if self.guarantees.remote.is_some() {
            return Ok(Page::NotReady);
        }
        let read = rustix::io::preadv2(
            &self.file,
            &mut [IoSliceMut::new(buffer)],
            at.get(),
            ReadWriteFlags::NOWAIT,
        );
        match read {
            Ok(read) if read == buffer.len() => {
                if is_zero(buffer) {
                    self.zeros.set(at, len);
                    return Ok(Page::Zero);
                }
                Ok(Page::Bytes(buffer))
            }
            // Only a part is in the page cache, or the file ends here (`read` tells which). Or none of it is in the
            // page cache, or the file system cannot say (NFS, FUSE).
            Ok(_) | Err(E::AGAIN | E::OPNOTSUPP | E::INTR) => Ok(Page::NotReady),
            Err(errno) => Err(Self::io_error(at)(errno.into())),
        }
    }

    fn read(&self, at: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.file.read_exact_at(buffer, at.get()).map_err(|source| {
            if source.kind() == ErrorKind::UnexpectedEof {
                SourceError::Truncated {
                    end: at.get().saturating_add(ByteLen::of_slice(buffer).get()),
                }
            } else {
                Self::io_error(at)(source)
            }
        })?;
        // Checked here, on a thread that may wait for the file server.
        if self.guarantees.remote.is_some() {
            self.check_now()?;
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<(), SourceError> {
        if self.lease_trust.holds() {
            return Ok(());
        }
        let is_remote = self.guarantees.remote.is_some();
        let (identity, ctime) = if is_remote {
            let now = self.look_at_file(Look::Cached)?;
            (*now.identity(), now.ctime())
        } else {
            // Runs for each fault: `fstat` takes 0.1 us less than `statx`.
            let now =
                rustix::fs::fstat(&self.file).map_err(|errno| Self::io_error(TemplateOffset::new(0))(errno.into()))?;
            (Identity::of_stat(&now), ctime_of_stat(&now))
        };
        if identity == *self.identity() && ctime == self.seen_ctime.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.look(if is_remote { Look::Cached } else { Look::Now }).map(drop)
    }

    fn zeros(&self) -> &ZeroMap {
        &self.zeros
    }

    fn knows_all_zeros(&self) -> bool {
        self.kept_zeros().is_ok()
    }

    fn find_zeros(&self, at: TemplateOffset, len: ByteLen) -> Result<(), SourceError> {
        let end = at.get().saturating_add(len.get()).min(self.identity().size());
        let (mut at, mut buffer) = (at, Vec::new());
        // Only data is read. Known zeros, and holes past the first `MOST_EXTENTS`, would cost as much.
        while let Some(unknown) = self.zeros.next_unknown(at).filter(|run| run.at.get() < end) {
            let start = unknown.at.get();
            let stop = end.min(start.saturating_add(unknown.len.get().min(SCAN_BYTES as u64)));
            let data = if self.holes_are_believed() {
                next_data(&self.file, start..stop).map_err(Self::io_error(unknown.at))?
            } else {
                start..stop
            };
            // Blocks of the file system may be smaller than pages.
            let first = data.start - data.start % PageSize::SMALLEST;
            let last = data.end.next_multiple_of(PageSize::SMALLEST).min(stop);
            buffer.resize(usize::try_from(last - first).unwrap_or(SCAN_BYTES), 0);
            self.read_past_cache(TemplateOffset::new(first), &mut buffer)?;
            // Checked before anything is noted: past the end of a truncated file there are holes as well.
            self.check_now()?;
            self.zeros.set(unknown.at, ByteLen::new(data.start - start));
            // Only whole pages are noted: the rest of a page that was read in part may hold data.
            let small = PageSize::Small.as_usize();
            for (page, at) in buffer.chunks_exact(small).zip((first..last).step_by(small)) {
                if is_zero(page) {
                    self.zeros.set(TemplateOffset::new(at), PageSize::Small.len());
                }
            }
            at = TemplateOffset::new(last);
        }
        self.check_now()
    }
    fn mapping(self: Arc<Self>) -> Option<Arc<dyn MappedPages>> {
        self.mapped.is_some().then_some(self as _)
    }
}

impl MappedPages for MemFile {
    fn resident_run(&self, at: TemplateOffset, len: ByteLen) -> Option<MappedRange<'_>> {
        // Without a lease, only bytes read before a check are known to be the template's.
        let mapped = self.mapped.as_ref().filter(|_| self.lease_trust.holds())?;
        let range = mapped.range(at.get(), len)?;
        (self.is_pinned() || (self.guarantees.residency && range.is_resident())).then_some(range)
    }

    fn known_resident(&self, at: TemplateOffset, len: ByteLen) -> Residency<'_> {
        let Some(now) = self.lease_trust.holds_now() else {
            return Residency::Unknown;
        };
        if self.is_pinned() {
            let range = self.mapped.as_ref().and_then(|mapped| mapped.range(at.get(), len));
            return range.map_or(Residency::Unknown, Residency::Mapped);
        }
        let blocks = self.blocks.as_ref();
        blocks.map_or(Residency::Unknown, |blocks| blocks.find(at, len, now))
    }

    fn map(&self, at: TemplateOffset) {
        if let Some(blocks) = &self.blocks {
            blocks.map(at, &self.zeros);
        }
    }

    fn release(&self) {
        if let Some(blocks) = &self.blocks {
            blocks.close_all();
        }
    }
}

/// The number of bytes of `file` that are not on its disk yet. `None` if the kernel does not say.
fn dirty_bytes(file: &File) -> Option<u64> {
    dirty::dirty_bytes(file.as_fd()).ok()
}

/// Returns `true` if no page of `file` is dirty. A small number of dirty pages is written to the disk first.
fn is_written_out(file: &File) -> bool {
    match dirty_bytes(file) {
        Some(0) => true,
        Some(..=MOST_WRITTEN_OUT) => dirty::write_out(file.as_fd()).is_ok() && dirty_bytes(file) == Some(0),
        _ => false,
    }
}

/// Notes the holes of `file`, as far as its file system reports them and [`MOST_EXTENTS`] allows.
fn find_holes(file: &File, size: u64, zeros: &ZeroMap) -> std::io::Result<()> {
    let mut at = 0;
    for _ in 0..MOST_EXTENTS {
        let data = next_data(file, at..size)?;
        zeros.set(TemplateOffset::new(at), ByteLen::new(data.start - at));
        if data.end == size {
            break;
        }
        at = data.end;
    }
    Ok(())
}

/// The first part of these bytes of `file` that is no hole, as far as its file system reports holes. An empty part at
/// their end if all of them are holes.
fn next_data(file: &File, bytes: Range<u64>) -> std::io::Result<Range<u64>> {
    let within = |at: u64| at.clamp(bytes.start, bytes.end);
    let start = match rustix::fs::seek(file, SeekFrom::Data(bytes.start)) {
        Ok(data) => within(data),
        // No data from here on.
        Err(E::NXIO) => bytes.end,
        // The file system reports no holes: all of it may be data.
        Err(E::INVAL | E::OPNOTSUPP) => return Ok(bytes),
        Err(errno) => return Err(errno.into()),
    };
    if start == bytes.end {
        return Ok(start..start);
    }
    Ok(start..within(rustix::fs::seek(file, SeekFrom::Hole(start))?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    const PAGE: usize = PageSize::Small.as_usize();

    fn page(index: u64) -> TemplateOffset {
        TemplateOffset::new(index * PageSize::SMALLEST)
    }

    /// Pages: data, hole, hole, zeros, data.
    fn mem_file() -> (tempfile::TempDir, MemFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        let file = File::create(&path).unwrap();
        file.write_all_at(&[7; PAGE], 0).unwrap();
        file.write_all_at(&[0; PAGE], 3 * PAGE as u64).unwrap();
        file.write_all_at(&[9; PAGE], 4 * PAGE as u64).unwrap();
        let mem_file = MemFile::open(&path).unwrap();
        (dir, mem_file)
    }

    #[test]
    fn holes_are_known_at_once_and_zero_pages_once_read() {
        let (_dir, mem_file) = mem_file();
        let mut buffer = [0; PAGE];
        assert_eq!(mem_file.try_read(page(1), &mut [0; 2 * PAGE]).unwrap(), Page::Zero);
        assert!(!mem_file.zeros().covers(page(3), PageSize::Small.len()));
        assert_eq!(mem_file.try_read(page(3), &mut buffer).unwrap(), Page::Zero);
        assert!(mem_file.zeros().covers(page(3), PageSize::Small.len()));
        assert_eq!(
            mem_file.try_read(page(4), &mut buffer).unwrap(),
            Page::Bytes(&[9; PAGE])
        );
    }

    #[test]
    fn all_zeros_are_found_when_asked_for() {
        let (_dir, mem_file) = mem_file();
        mem_file.find_zeros(page(0), mem_file.len()).unwrap();
        assert_eq!(mem_file.zeros().known_bytes(), ByteLen::new(3 * PageSize::SMALLEST));
    }

    #[test]
    fn holes_past_those_that_are_found_at_once_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        let file = File::create(&path).unwrap();
        // Of each 16 pages one is data. The last one is all zeros.
        let extents = MOST_EXTENTS as u64 + 100;
        for extent in 0..extents {
            let byte = u8::from(extent + 1 < extents);
            file.write_all_at(&[byte; PAGE], page(extent * 16 + 8).get()).unwrap();
        }
        file.set_len(page(extents * 16).get()).unwrap();
        let mem_file = MemFile::open(&path).unwrap();
        let at_once = mem_file.zeros().known_bytes();
        mem_file.find_zeros(page(0), mem_file.len()).unwrap();
        let all = ByteLen::new((extents * 15 + 1) * PageSize::SMALLEST);
        assert_eq!(mem_file.zeros().known_bytes(), all);
        assert!(!mem_file.zeros().covers(page(8), PageSize::Small.len()));
        if at_once == ByteLen::new(0) {
            return pagecast_testkit::skip::skip("a file system that tells of holes");
        }
        assert!(at_once < all);
    }

    #[test]
    fn what_is_past_the_end_of_a_truncated_file_is_not_taken_for_zeros() {
        let (_dir, mem_file) = mem_file();
        let known = mem_file.zeros().known_bytes();
        let file = File::options().write(true).open(mem_file.path()).unwrap();
        file.set_len(PAGE as u64).unwrap();
        mem_file.find_zeros(page(0), mem_file.len()).unwrap_err();
        assert_eq!(mem_file.zeros().known_bytes(), known);
    }

    #[test]
    fn looking_for_zeros_leaves_the_page_cache_as_it_was() {
        // The kernel does not drop a page that is in use just then: not every try has to succeed.
        for _ in 0..10 {
            let (_dir, mem_file) = mem_file();
            mem_file.file.sync_all().unwrap();
            rustix::fs::fadvise(&mem_file.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let ready = |index| mem_file.try_read(page(index), &mut [0; PAGE]).unwrap() != Page::NotReady;
            let probe = rustix::io::preadv2(&mem_file.file, &mut [], 0, DONTCACHE);
            if ready(4) || probe.is_err() {
                return pagecast_testkit::skip::skip("RWF_DONTCACHE here (Linux 6.14; ext4, XFS)");
            }
            mem_file.read(page(0), &mut [0; PAGE]).unwrap();
            rustix::fs::fadvise(
                &mem_file.file,
                page(4).get(),
                std::num::NonZero::new(PageSize::SMALLEST),
                rustix::fs::Advice::DontNeed,
            )
            .unwrap();
            mem_file.find_zeros(page(0), mem_file.len()).unwrap();
            assert_eq!(mem_file.zeros().known_bytes(), ByteLen::new(3 * PageSize::SMALLEST));
            if ready(0) && !ready(4) {
                return;
            }
        }
        panic!("the search has filled the page cache");
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_not_ready_and_not_waited_for() {
        let (_dir, mem_file) = mem_file();
        mem_file.file.sync_all().unwrap();
        rustix::fs::fadvise(&mem_file.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut buffer = [0; PAGE];
        match mem_file.try_read(page(0), &mut buffer).unwrap() {
            Page::NotReady => {}
            // tmpfs has no backing store to drop pages to.
            Page::Bytes(_) => pagecast_testkit::skip::skip("this file system keeps its pages in memory"),
            Page::Zero => panic!("zeros in place of bytes"),
        }
        mem_file.read(page(0), &mut buffer).unwrap();
        assert_eq!(buffer, [7; PAGE]);
        assert!(matches!(
            mem_file.try_read(page(0), &mut buffer).unwrap(),
            Page::Bytes(_)
        ));
    }

    #[test]
    fn a_truncated_file_is_an_error_and_never_zeros() {
        let (_dir, mem_file) = mem_file();
        File::options()
            .write(true)
            .open(mem_file.path())
            .unwrap()
            .set_len(PAGE as u64)
            .unwrap();
        let mut buffer = [0; PAGE];
        // Never `Bytes`, never `Zero`.
        assert_eq!(mem_file.try_read(page(4), &mut buffer).unwrap(), Page::NotReady);
        assert!(matches!(
            mem_file.read(page(4), &mut buffer),
            Err(SourceError::Truncated { .. })
        ));
        assert!(matches!(mem_file.check_unchanged(), Err(SourceError::Changed { .. })));
    }

    #[test]
    fn a_replaced_path_is_noticed_but_the_file_is_held() {
        let (dir, mem_file) = mem_file();
        let other = dir.path().join("other");
        File::create(&other).unwrap().write_all(&vec![1; 5 * PAGE]).unwrap();
        std::fs::rename(&other, mem_file.path()).unwrap();
        assert!(matches!(mem_file.check_path(), Err(SourceError::Changed { .. })));
        mem_file.check_unchanged().unwrap();
        let mut buffer = [0; PAGE];
        mem_file.read(page(0), &mut buffer).unwrap();
        assert_eq!(buffer, [7; PAGE]);
    }

    #[test]
    fn what_is_held_can_be_linked_though_its_path_was_replaced() {
        let (dir, mem_file) = mem_file();
        let (other, link) = (dir.path().join("other"), dir.path().join("link"));
        // A link of its own, because a file without any can get none (`linkat(2)`).
        std::fs::hard_link(mem_file.path(), dir.path().join("kept")).unwrap();
        std::fs::write(&other, [1; PAGE]).unwrap();
        std::fs::rename(&other, mem_file.path()).unwrap();
        let held = format!("/proc/self/fd/{}", mem_file.as_fd().as_raw_fd());
        rustix::fs::linkat(
            rustix::fs::CWD,
            held,
            rustix::fs::CWD,
            &link,
            rustix::fs::AtFlags::SYMLINK_FOLLOW,
        )
        .unwrap();
        let linked = Identity::of(&std::fs::metadata(&link).unwrap());
        assert_eq!(mem_file.identity().difference(&linked), None);
        mem_file.check_unchanged().unwrap();
    }

    #[test]
    fn what_cannot_be_a_template_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        assert!(matches!(MemFile::open(&path), Err(OpenError::Io { .. })));
        assert!(matches!(
            MemFile::open(dir.path()),
            Err(OpenError::NotAFile {
                what: "a directory",
                ..
            })
        ));
        assert!(matches!(
            MemFile::open(Path::new("/dev/null")),
            Err(OpenError::NotAFile { what: "a device", .. })
        ));
        for size in [0, 4095, 6000] {
            std::fs::write(&path, vec![1; size]).unwrap();
            assert!(matches!(MemFile::open(&path), Err(OpenError::Size { .. })));
        }
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(matches!(
            MemFile::open(&path),
            Err(OpenError::NotAFile { what: "a fifo", .. })
        ));
    }
}
