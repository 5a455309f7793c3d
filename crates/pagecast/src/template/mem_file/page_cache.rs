//! Brings a mem-file into the page cache in order, in pages of 2 MiB if its file system has them. Can also lock it
//! there.
//!
//! VMMs with Firecracker's `File` backend map the page cache. If it consists of pages of 2 MiB, one fault maps 2 MiB,
//! and a write still copies 4 KiB only: see `docs/performance.md` for the gain. Pages that are in the page cache keep
//! their size until they are dropped. The kernel drops only pages that no process maps.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use pagecast_uffd::{ByteLen, Errno, MappedFile};
use rustix::fs::Advice;

use super::MemFile;
use crate::page::PageSize;
use crate::template::{PageSource, Run, SourceError, TemplateOffset, WorkingSet};

/// The preferred size of pages, in bytes.
const HUGE: u64 = PageSize::Huge.bytes();

/// How many bytes are mapped at once. They count as memory of this process meanwhile.
const STEP: u64 = 4 * HUGE;

/// If a working set has this many bytes of a 2 MiB page (an eighth), all of the page is read. That costs a disk little
/// more than scattered reads, and saves each fork many faults.
const DENSE: u64 = HUGE / 8;

/// How many times in a row dropping small pages may bring no large ones before it is given up.
const MOST_FRUITLESS: u32 = 4;

/// The parts of a template to bring into the page cache, in this order: runs of whole small pages, at most 8 MiB each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    runs: Vec<Run>,
    is_all_data: bool,
}

impl Wanted {
    /// Everything that is not known to be zeros, in whole pages of 2 MiB.
    pub fn data(file: &MemFile) -> Self {
        let mut this = Self {
            is_all_data: true,
            ..Self::default()
        };
        let mut at = 0;
        while let Some(block) = block_of(file, at) {
            if !file.zeros.covers(block.at, block.len) {
                this.add(block);
            }
            at += HUGE;
        }
        this
    }

    /// A working set, in first-touch order. Takes all of a 2 MiB page if at least an eighth of it is in the set.
    pub fn working_set(file: &MemFile, working_set: &WorkingSet) -> Self {
        let mut used = std::collections::BTreeMap::<u64, u64>::new();
        for run in working_set.runs() {
            // A run lies within an aligned 256 KiB.
            *used.entry(run.at.get() / HUGE).or_default() += run.len.get();
        }
        let mut this = Self::default();
        for run in working_set.runs() {
            let block = run.at.get() / HUGE;
            match used.get(&block) {
                Some(bytes) if *bytes >= DENSE => {
                    used.insert(block, 0);
                    if let Some(block) = block_of(file, block * HUGE) {
                        this.add(block);
                    }
                }
                // It was added as a whole.
                Some(0) => {}
                _ => this.add(*run),
            }
        }
        this
    }

    /// The number of bytes in all runs.
    pub fn size(&self) -> ByteLen {
        ByteLen::new(self.runs.iter().map(|run| run.len.get()).sum())
    }

    /// Returns `true` if this is everything that is not known to be zeros, which shrinks as more zeros become known.
    pub fn is_all_data(&self) -> bool {
        self.is_all_data
    }

    /// The runs, in the order in which to load them.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Adds a run at the end, or extends the last run if both fit into one.
    fn add(&mut self, run: Run) {
        if let Some(last) = self.runs.last_mut()
            && last.at.get() + last.len.get() == run.at.get()
            && last.at.get().is_multiple_of(HUGE)
            && last.len.get() + run.len.get() <= STEP
        {
            last.len = ByteLen::new(last.len.get() + run.len.get());
        } else {
            self.runs.push(run);
        }
    }
}

/// The 2 MiB at `at`, or the part of them that the file has.
fn block_of(file: &MemFile, at: u64) -> Option<Run> {
    let len = file.len().get().checked_sub(at).filter(|left| *left > 0)?.min(HUGE);
    Some(Run {
        at: TemplateOffset::new(at),
        len: ByteLen::new(len),
    })
}

/// Brings parts of a mem-file into the page cache.
#[derive(Debug)]
pub struct Loader<'a> {
    file: &'a MemFile,
    /// Whether small pages may be dropped from the page cache, to be read again as large ones.
    may_drop: bool,
    /// Whether dirty pages, which cannot be dropped, were written to the disk.
    written: bool,
    fruitless: u32,
}

impl<'a> Loader<'a> {
    /// Creates a loader that only adds to the page cache.
    pub fn new(file: &'a MemFile) -> Self {
        Self {
            file,
            may_drop: false,
            written: false,
            fruitless: 0,
        }
    }

    /// Creates a loader that drops small pages which no process maps, to read them again as large ones, while that
    /// works.
    pub fn dropping(file: &'a MemFile) -> Self {
        Self {
            may_drop: true,
            ..Self::new(file)
        }
    }

    /// Brings `run` into the page cache, and waits for the disk. Returns how many of its bytes are in pages of 2 MiB,
    /// as far as the kernel tells (Linux 6.7).
    ///
    /// # Errors
    ///
    /// [`SourceError`] if the run cannot be read, or is not in the file.
    pub fn load(&mut self, run: Run) -> Result<ByteLen, SourceError> {
        let huge = self.load_once(run)?;
        if !self.may_drop || huge.get() >= whole_blocks(run) {
            return Ok(huge);
        }
        if !self.written {
            // `fdatasync(2)` accepts a descriptor that is open for reading only. The writer of the file gets to see a
            // failure.
            let _ = rustix::fs::fdatasync(self.file);
            self.written = true;
        }
        if rustix::fs::fadvise(
            self.file,
            run.at.get(),
            std::num::NonZeroU64::new(run.len.get()),
            Advice::DontNeed,
        )
        .is_err()
        {
            self.may_drop = false;
            return Ok(huge);
        }
        let now = self.load_once(run)?;
        if now > huge {
            self.fruitless = 0;
        } else {
            self.fruitless += 1;
            // The file system has no such pages, there is no memory for them, or every page is mapped.
            self.may_drop = self.fruitless < MOST_FRUITLESS;
        }
        Ok(now)
    }

    fn load_once(&self, run: Run) -> Result<ByteLen, SourceError> {
        let mapped = map(self.file, run).map_err(io_error(run))?;
        match mapped.populate() {
            Ok(()) => Ok(mapped.huge_bytes().unwrap_or(ByteLen::ZERO)),
            Err(errno) if cannot_read(errno) => {
                // The read reports the error. It also does the work if the kernel cannot populate (before Linux 5.14).
                self.read(run)?;
                Ok(ByteLen::ZERO)
            }
            Err(errno) => Err(io_error(run)(errno)),
        }
    }

    fn read(&self, run: Run) -> Result<(), SourceError> {
        let mut buffer = vec![0; PageSize::Small.as_usize() * 64];
        let end = run.at.get().saturating_add(run.len.get());
        let mut at = run.at.get();
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            self.file
                .read(TemplateOffset::new(at), buffer.get_mut(..len).unwrap_or_default())?;
            at += len as u64;
        }
        Ok(())
    }
}

/// A part of a mem-file that stays in the page cache until this is dropped.
#[derive(Debug)]
pub struct Locked {
    mapped: Arc<MappedFile>,
    run: Run,
}

/// Why a part of a mem-file cannot be locked in the page cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// The process may not lock that much memory.
    #[error(
        "this process may not lock so much memory: give it CAP_IPC_LOCK, or raise RLIMIT_MEMLOCK (`ulimit -l`, \
         LimitMEMLOCK= of systemd)"
    )]
    Limit,
    /// Anything else, such as too little memory.
    #[error("the template cannot be locked in memory at {at}")]
    Io {
        /// Where.
        at: TemplateOffset,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Locked {
    /// Brings `run` into the page cache and keeps it there.
    ///
    /// # Errors
    ///
    /// [`LockError`].
    pub fn new(file: &MemFile, run: Run) -> Result<Self, LockError> {
        let failed = |errno: Errno| LockError::Io {
            at: run.at,
            source: io::Error::from_raw_os_error(errno.get()),
        };
        let no_mapping = Errno::new(rustix::io::Errno::NODEV.raw_os_error());
        let mapped = file.mapped.as_ref().ok_or_else(|| failed(no_mapping))?;
        let Some(range) = mapped.range(run.at.get(), run.len) else {
            return Err(failed(Errno::new(rustix::io::Errno::INVAL.raw_os_error())));
        };
        match range.lock() {
            Ok(()) => Ok(Self {
                mapped: Arc::clone(mapped),
                run,
            }),
            // The kernel returns ENOMEM for a limit, too. If the run can be populated without a lock, the limit is the
            // cause.
            Err(errno)
                if errno.get() == EPERM
                    || (errno.get() == ENOMEM && map(file, run).is_ok_and(|mapped| mapped.populate().is_ok())) =>
            {
                range.unlock();
                Err(LockError::Limit)
            }
            Err(errno) => {
                range.unlock();
                Err(failed(errno))
            }
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> ByteLen {
        self.run.len
    }

    /// Returns `true` if there are no bytes, which is never the case.
    pub fn is_empty(&self) -> bool {
        self.run.len.is_zero()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Some(range) = self.mapped.range(self.run.at.get(), self.run.len) {
            range.unlock();
            range.release();
        }
    }
}

const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const ENOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();

/// Maps a part of the file so that missing pages come as large ones.
fn map(file: &MemFile, run: Run) -> Result<MappedFile, Errno> {
    let mapped = MappedFile::new(file.as_fd(), run.at.get(), run.len)?;
    if run.at.get().is_multiple_of(HUGE) {
        // Without transparent hugepages in the kernel, the pages are small.
        let _ = mapped.prefer_huge();
    }
    Ok(mapped)
}

/// The number of bytes of `run` that can be in pages of 2 MiB.
fn whole_blocks(run: Run) -> u64 {
    if run.at.get().is_multiple_of(HUGE) {
        run.len.get() / HUGE * HUGE
    } else {
        0
    }
}

/// Returns `true` for errors of populating that a read can explain.
fn cannot_read(errno: Errno) -> bool {
    use rustix::io::Errno as E;
    [E::FAULT, E::INVAL, E::HWPOISON]
        .iter()
        .any(|known| known.raw_os_error() == errno.get())
}

fn io_error(run: Run) -> impl FnOnce(Errno) -> SourceError {
    move |errno| SourceError::Io {
        at: run.at,
        source: io::Error::from_raw_os_error(errno.get()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use pagecast_testkit::skip::skip;

    use super::*;
    use crate::template::Recording;

    const PAGE: u64 = PageSize::SMALLEST;
    const PAGE_LEN: usize = PageSize::Small.as_usize();
    const HUGE_LEN: usize = PageSize::Huge.as_usize();

    /// A file of these blocks of 2 MiB, with holes for `false`, and an odd page at its end.
    fn mem_file(blocks: &[bool]) -> (tempfile::TempDir, MemFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        let mut file = File::create(&path).unwrap();
        for (index, is_data) in blocks.iter().enumerate() {
            if *is_data {
                std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; HUGE_LEN], index as u64 * HUGE).unwrap();
            }
        }
        file.set_len(blocks.len() as u64 * HUGE).unwrap();
        std::io::Seek::seek(&mut file, io::SeekFrom::End(0)).unwrap();
        file.write_all(&[9; PAGE_LEN]).unwrap();
        drop(file);
        (dir, MemFile::open(&path).unwrap())
    }

    fn run(at: u64, len: u64) -> Run {
        Run {
            at: TemplateOffset::new(at),
            len: ByteLen::new(len),
        }
    }

    fn is_cached(file: &MemFile, at: u64) -> bool {
        let mut page = [0; PAGE_LEN];
        !matches!(
            file.try_read(TemplateOffset::new(at), &mut page).unwrap(),
            crate::template::Page::NotReady
        )
    }

    /// Returns `false`, and says so, if the file system keeps its pages in memory.
    fn drop_from_cache(file: &MemFile) -> bool {
        rustix::fs::fdatasync(file).unwrap();
        rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
        // Asking has the kernel read ahead, so it is the end that is asked for.
        let dropped = !is_cached(file, file.len().get() - PAGE);
        if !dropped {
            skip("this file system keeps its pages in memory");
        }
        dropped
    }

    #[test]
    fn data_is_wanted_in_whole_large_pages_without_the_holes() {
        let (_dir, file) = mem_file(&[true, false, true, true, true, true, true]);
        let wanted = Wanted::data(&file);
        assert_eq!(
            wanted.runs(),
            [run(0, HUGE), run(2 * HUGE, 4 * HUGE), run(6 * HUGE, HUGE + PAGE)]
        );
        assert_eq!(wanted.size(), ByteLen::new(6 * HUGE + PAGE));
    }

    #[test]
    fn a_working_set_is_wanted_in_first_touch_order_and_whole_where_it_is_dense() {
        let (_dir, file) = mem_file(&[true; 4]);
        let mut recording = Recording::new(file.len());
        // Two pages of block 3, half of block 1, the page at the end of the file.
        for page in [3 * 512 + 7, 3 * 512 + 300]
            .into_iter()
            .chain(512..768)
            .chain([4 * 512])
        {
            recording.push(TemplateOffset::new(page * PAGE));
        }
        let wanted = Wanted::working_set(&file, &WorkingSet::of(&recording));
        assert_eq!(
            wanted.runs(),
            [
                run((3 * 512 + 7) * PAGE, PAGE),
                run((3 * 512 + 300) * PAGE, PAGE),
                run(HUGE, HUGE),
                run(4 * HUGE, PAGE)
            ]
        );
    }

    #[test]
    fn what_is_loaded_is_in_the_page_cache_and_nothing_else() {
        let (_dir, file) = mem_file(&[true; 16]);
        if !drop_from_cache(&file) {
            return;
        }
        Loader::new(&file).load(run(8 * HUGE, HUGE)).unwrap();
        assert!(is_cached(&file, 8 * HUGE) && is_cached(&file, 9 * HUGE - PAGE));
        assert!(!is_cached(&file, 0));
    }

    #[test]
    fn small_pages_are_exchanged_for_large_ones_and_bytes_stay_right() {
        let (_dir, file) = mem_file(&[true; 4]);
        if !drop_from_cache(&file) {
            return;
        }
        // Read here and there, so that small pages come.
        for block in 0..4 {
            rustix::fs::fadvise(&file, block * HUGE, std::num::NonZeroU64::new(HUGE), Advice::WillNeed).unwrap();
            file.read(TemplateOffset::new(block * HUGE), &mut vec![0; HUGE_LEN])
                .unwrap();
        }
        let all = run(0, 4 * HUGE);
        let before = Loader::new(&file).load(all).unwrap();
        let after = Loader::dropping(&file).load(all).unwrap();
        assert!(after >= before, "{before:?} {after:?}");
        if after == ByteLen::ZERO {
            skip("this file system has no large pages, or there is no memory for them");
        }
        let mut bytes = vec![0; 4 * HUGE_LEN];
        file.read(TemplateOffset::new(0), &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_truncated_file_is_an_error_and_no_signal() {
        let (dir, file) = mem_file(&[true; 2]);
        File::options()
            .write(true)
            .open(dir.path().join("mem"))
            .unwrap()
            .set_len(PAGE)
            .unwrap();
        assert!(matches!(
            Loader::dropping(&file).load(run(0, 2 * HUGE)),
            Err(SourceError::Truncated { .. })
        ));
        assert!(Locked::new(&file, run(0, 2 * HUGE)).is_err());
    }

    #[test]
    fn what_is_locked_cannot_be_dropped_until_it_is_let_go() {
        let (_dir, file) = mem_file(&[true; 2]);
        if !drop_from_cache(&file) {
            return;
        }
        let locked = Locked::new(&file, run(0, HUGE)).unwrap();
        assert_eq!(locked.len(), ByteLen::new(HUGE));
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        assert!(is_cached(&file, 0));
        drop(locked);
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        assert!(!is_cached(&file, 0));
    }
}
