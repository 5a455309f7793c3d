//! Templates, the sources of the pages of forks.
//!
//! A [`Template`] hands out the pages of a [`PageSource`]. On Linux, `MemFile` is one: the memory file that a paused
//! microVM leaves behind.
//!
//! Its modules, each of which uses only modules further down:
//!
//! | module | holds |
//! | --- | --- |
//! | `slow_reads`, `zero_search` | reads and searches away from the fault path, on threads of a template |
//! | `live_source` | a source until its template is withdrawn |
//! | `mem_file` | the memory file of a paused microVM, its lease, its place in the page cache, its kept zeros |
//! | `working_set` | the pages that forks touch first |
//! | `source` | the traits that pages come through, and their errors |
//! | `zeros` | the pages that are zeros |
//! | `sidecar`, `content`, `identity` | files beside a mem-file, and the content that they are kept for |
//! | `open` | why a file cannot be a template |
//! | `run` | offsets and runs of pages |

#[cfg(target_os = "linux")]
mod content;
#[cfg(unix)]
mod identity;
mod live_source;
#[cfg(target_os = "linux")]
mod mem_file;
mod open;
mod run;
#[cfg(target_os = "linux")]
mod sidecar;
mod slow_reads;
mod source;
mod working_set;
mod zero_search;
mod zeros;

use std::fmt;
use std::path::Path;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pagecast_uffd::ByteLen;

#[cfg(target_os = "linux")]
pub use content::ContentIdentity;
#[cfg(unix)]
pub use identity::Identity;
#[cfg(target_os = "linux")]
pub use identity::{FileState, KeptIdentity};
use live_source::LiveSource;
#[cfg(target_os = "linux")]
pub use mem_file::{KeepError, Lease, LeaseError, Loader, LockError, Locked, MemFile, Wanted};
pub use open::OpenError;
pub use run::{Run, TemplateOffset};
#[cfg(target_os = "linux")]
pub use sidecar::SidecarError;
pub use slow_reads::SlowReadStats;
use slow_reads::SlowReads;
pub(crate) use slow_reads::{ReadFor, ReadResult};
#[cfg(target_os = "linux")]
pub use source::{MappedPages, Residency};
pub use source::{Page, PageSource, SourceError};
use working_set::Tallies;
pub use working_set::{Planned, PrefaultPlan, PrefaultScore, PrefaultTally, Recording, WorkingSet};
use zero_search::ZeroSearch;
pub use zeros::{ZeroMap, ZeroRuns};
#[cfg(target_os = "linux")]
pub(crate) use zeros::{is_zero, leading_zero_pages};

/// An immutable memory image of a paused microVM. Cloning it is cheap and gives the same template.
#[derive(Clone)]
pub struct Template {
    inner: Arc<Inner>,
}

struct Inner {
    source: Arc<LiveSource>,
    slow_reads: SlowReads,
    zero_search: ZeroSearch,
    /// The runs of all zeros, once they are known.
    #[cfg(target_os = "linux")]
    zero_runs: OnceLock<ZeroRuns>,
    /// The working set that new forks prefault. Read once for each fork, never on the fault path.
    working_set: Mutex<Option<Arc<WorkingSet>>>,
    /// Results of the prefaults with this working set.
    tallies: Mutex<Tallies>,
}

impl Template {
    /// Opens the mem-file at `path`.
    ///
    /// # Errors
    ///
    /// [`OpenError`] if the file cannot be a template; always [`OpenError::Unsupported`] if the platform is not Linux.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        #[cfg(target_os = "linux")]
        return MemFile::open(path).map(|file| Self::from_source(Arc::new(file)));
        #[cfg(not(target_os = "linux"))]
        {
            let _ = path;
            Err(OpenError::Unsupported)
        }
    }

    /// Creates a template whose pages come from `source`.
    pub fn from_source(source: Arc<impl PageSource>) -> Self {
        let zeros_are_known = source.knows_all_zeros();
        let source = Arc::new(LiveSource::new(source));
        Self {
            inner: Arc::new(Inner {
                slow_reads: SlowReads::new(&source),
                zero_search: ZeroSearch::new(&source, zeros_are_known),
                source,
                #[cfg(target_os = "linux")]
                zero_runs: OnceLock::new(),
                working_set: Mutex::default(),
                tallies: Mutex::default(),
            }),
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> ByteLen {
        self.source().len()
    }

    /// Returns `true` if the template is empty.
    pub fn is_empty(&self) -> bool {
        self.source().is_empty()
    }

    /// Returns `true` if `other` is a clone of this template.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The source of the pages.
    pub fn source(&self) -> &dyn PageSource {
        self.inner.source.source()
    }

    /// The pages that can be installed without being read.
    #[cfg(target_os = "linux")]
    pub(crate) fn mapping(&self) -> Option<&dyn MappedPages> {
        self.inner.source.mapping()
    }

    /// Maps the pages around `at` on a thread of this template, if they are in memory.
    #[cfg(target_os = "linux")]
    pub(crate) fn map_later(&self, at: TemplateOffset) {
        self.inner.slow_reads.map_later(at);
    }

    /// Releases memory that was mapped to answer faults. It is mapped again on demand.
    #[cfg(target_os = "linux")]
    pub(crate) fn release_mapped(&self) {
        if let Some(mapping) = self.mapping() {
            mapping.release();
        }
    }

    /// Checks that the template may be forked: not withdrawn, and unchanged since it was opened.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`], or the error that prevented the check.
    pub fn check(&self) -> Result<(), SourceError> {
        self.inner.source.check_not_withdrawn()?;
        self.source().check_unchanged()
    }

    /// Statistics of the reads away from the fault path.
    pub fn slow_reads(&self) -> SlowReadStats {
        self.inner.slow_reads.stats()
    }

    /// Ends reading away from the fault path: no new read begins. The first reason stays.
    pub(crate) fn withdraw(&self, how: &str) {
        self.inner.source.withdraw(how);
    }

    /// Waits until no thread reads the withdrawn template away from the fault path. Returns `false` if one still does.
    pub(crate) fn wait_unread(&self, until: Instant) -> bool {
        self.inner.slow_reads.wait(until) && self.inner.zero_search.wait(until)
    }

    /// Ensures that a thread for reads away from the fault path exists, for the life of the template.
    pub(crate) fn start_reader(&self) -> std::io::Result<()> {
        self.inner.slow_reads.start()
    }

    /// Reads `length` bytes at `at` on a thread of this template, which may block, and calls `done` there. Returns
    /// `false` if [`start_wanted_readers`](Self::start_wanted_readers) should be called later.
    #[must_use]
    pub(crate) fn read_later(
        &self,
        at: TemplateOffset,
        length: usize,
        read_for: ReadFor,
        done: impl FnOnce(ReadResult) + Send + 'static,
    ) -> bool {
        self.inner.slow_reads.submit(at, length, read_for, Box::new(done))
    }

    /// Tries again to start a thread for waiting reads. Returns `false` if that should be tried again later.
    pub(crate) fn start_wanted_readers(&self) -> bool {
        self.inner.slow_reads.start_wanted()
    }

    /// The pages that forks touch first, as far as learned.
    pub fn working_set(&self) -> Option<Arc<WorkingSet>> {
        // No code that can panic runs under this lock.
        let working_set = self.inner.working_set.lock();
        working_set.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the working set that new forks prefault; served forks keep theirs. A working set of a template of another
    /// length counts as `None`.
    pub fn set_working_set(&self, working_set: Option<Arc<WorkingSet>>) {
        let fitting = working_set.filter(|set| set.template() == self.len());
        let kept = self.inner.working_set.lock();
        *kept.unwrap_or_else(PoisonError::into_inner) = fitting;
        *self.tallies() = Tallies::default();
    }

    /// How well prefaults with the current working set do. Each new working set starts from zero.
    pub fn prefault_score(&self) -> PrefaultScore {
        self.tallies().score()
    }

    pub(crate) fn note_prefault(&self, tally: PrefaultTally) {
        self.tallies().add(tally);
    }

    fn tallies(&self) -> MutexGuard<'_, Tallies> {
        // No code that can panic runs under this lock.
        self.inner.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages that are known to be zeros by now.
    pub fn zeros(&self) -> &ZeroMap {
        self.source().zeros()
    }

    /// Returns `true` if all zeros are known: they [were looked for](Self::find_zeros), or the source
    /// [knew them](PageSource::knows_all_zeros) from the beginning.
    pub fn zeros_are_known(&self) -> bool {
        self.inner.zero_search.is_done()
    }

    /// The longest runs of zeros, as far as they are known.
    #[cfg(target_os = "linux")]
    pub(crate) fn zero_runs(&self) -> ZeroRuns {
        let known = || ZeroRuns::of(self.zeros().runs());
        if self.zeros_are_known() {
            self.inner.zero_runs.get_or_init(known).clone()
        } else {
            known()
        }
    }

    /// Searches the whole template for zeros, for [`zeros`](Self::zeros). Waits for the search no longer than `until`.
    pub fn find_zeros(&self, until: Instant) {
        self.inner.zero_search.run(until);
    }

    /// Searches for zeros in the background, at low priority. Calls `done` with the result, on the searching thread, or
    /// on this one if all zeros are known already. Never calls `done` if no thread can be started, or if the template
    /// is dropped first.
    pub fn find_zeros_in_background(&self, done: impl FnOnce(Result<(), &SourceError>) + Send + 'static) {
        self.inner.zero_search.run_in_background(Box::new(done));
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
