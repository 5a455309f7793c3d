//! The guest of a simulated VMM: its memory, and the expected content of every page.

use std::num::NonZeroU32;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};
use pagecast_uffd::Uffd;

use super::protocol::{Checked, History, Mismatch};
use crate::memory::GuestMemory;
use crate::pattern::{Pattern, WORD_SIZE};
use crate::template_file::{LAYOUT_PAGE, LAYOUT_PAGE_LEN, TemplateModel};

/// A guest that is connected to a page server.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) regions: Vec<GuestRegion>,
    pub(crate) page_size: u64,
    pub(crate) template: TemplateModel,
    /// Firecracker's own copy of the userfaultfd, unless it is to be closed.
    pub(crate) uffd: Option<Uffd>,
    /// The handshake socket, unless it is to be closed.
    pub(crate) socket: Option<UnixStream>,
    /// Set when nothing is removed any more.
    pub(crate) races_are_over: AtomicBool,
}

/// One region and the state of its pages.
#[derive(Debug)]
pub(crate) struct GuestRegion {
    pub(crate) memory: GuestMemory,
    /// Its offset in the template, in bytes.
    offset: u64,
    /// The number of its first page among all pages of the guest.
    first_page: u64,
    /// Number of its pages.
    pages: u64,
    /// One for each page, made at the first use: commands that only touch pages need none, and would measure their
    /// creation.
    states: OnceLock<Box<[PageState]>>,
}

/// The history of a page. Readers take no lock, so that they race with removals; changes exclude each other.
#[derive(Debug, Default)]
struct PageState {
    version: AtomicU64,
    changing: Mutex<()>,
}

/// The history of a page and its number of changes, in one word (a sequence lock): the upper half counts, and is odd
/// during a change; the lower half is the history before that change.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version(u64);

const ONE_STEP: u64 = 1 << 32;
const REMOVED: u64 = 1 << 31;

impl Version {
    fn history(self) -> History {
        History {
            removed: self.0 & REMOVED != 0,
            written: u32::try_from(self.0 & (REMOVED - 1)).ok().and_then(NonZeroU32::new),
        }
    }

    fn is_settled(self) -> bool {
        self.0 & ONE_STEP == 0
    }

    /// The next version, with this history.
    fn next(self, history: History) -> Self {
        let removed = if history.removed { REMOVED } else { 0 };
        let written = history.written.map_or(0, NonZeroU32::get);
        let steps = (self.0 & !(ONE_STEP - 1)).wrapping_add(ONE_STEP);
        Self(steps | removed | (u64::from(written) & (REMOVED - 1)))
    }
}

impl PageState {
    fn exclude_changes(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn version(&self) -> Version {
        Version(self.version.load(Ordering::Acquire))
    }

    /// The version after all reads before this call.
    fn version_after_reads(&self) -> Version {
        fence(Ordering::Acquire);
        Version(self.version.load(Ordering::Relaxed))
    }

    /// Announces a change before any of its effects. The caller excludes other changes.
    fn begin_change(&self) {
        let version = Version(self.version.load(Ordering::Relaxed));
        self.version.store(version.next(version.history()).0, Ordering::Relaxed);
        fence(Ordering::Release);
    }

    /// Ends a change: the page has this history from now on.
    fn end_change(&self, history: History) {
        let version = Version(self.version.load(Ordering::Relaxed));
        self.version.store(version.next(history).0, Ordering::Release);
    }
}

/// A page of a guest.
#[derive(Clone, Copy)]
struct Page<'a> {
    number: u64,
    region: &'a GuestRegion,
    /// Its number in the region.
    index: usize,
    /// Its offset in the region, in bytes.
    start: usize,
    /// The offset of its content in the template, in bytes.
    offset: u64,
}

impl<'a> Page<'a> {
    fn state(self) -> &'a PageState {
        &self.region.states()[self.index]
    }
}

/// The first wrong words in a check of a page.
#[derive(Default)]
struct Look {
    wrong: Option<Mismatch>,
    /// A template byte in a page that had been removed.
    stale: Option<Mismatch>,
}

impl GuestRegion {
    pub(crate) fn new(memory: GuestMemory, offset: u64, first_page: u64, page_size: u64) -> Self {
        let pages = memory.range().len().get() / page_size;
        Self {
            memory,
            offset,
            first_page,
            pages,
            states: OnceLock::new(),
        }
    }

    fn last_page(&self) -> u64 {
        self.first_page + self.pages
    }

    fn states(&self) -> &[PageState] {
        self.states
            .get_or_init(|| (0..self.pages).map(|_| PageState::default()).collect())
    }
}

impl Guest {
    pub(crate) fn kept_uffd(&self) -> Result<&Uffd> {
        let uffd = self.uffd.as_ref();
        uffd.context("the userfaultfd was closed after the handshake")
    }

    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> u64 {
        self.regions.last().map_or(0, GuestRegion::last_page)
    }

    /// Reads the first word of a page.
    pub(crate) fn touch(&self, number: u64) {
        let page = self.page(number);
        page.region.memory.load(page.start);
    }

    /// Writes a word of a page without noting it: the page cannot be checked afterwards.
    pub(crate) fn scribble(&self, number: u64) {
        let page = self.page(number);
        page.region.memory.store(page.start, number | 1);
    }

    /// Reads a page and checks every word.
    ///
    /// The first check takes no lock, so it races with removals as vCPUs do. If there was a change meanwhile, it
    /// reports only bytes that are wrong in any case. A second check, with changes excluded, is exact.
    pub(crate) fn check(&self, number: u64, checked: &mut Checked) {
        let page = self.page(number);
        let state = page.state();
        let before = state.version();
        let mut look = self.look(page, before.history());
        if !before.is_settled() || state.version_after_reads() != before {
            let unexcused = look.stale;
            let _no_changes = state.exclude_changes();
            look = self.look(page, state.version().history());
            look.stale = unexcused.or(look.stale);
        }
        let wrong = look.stale.or(look.wrong);
        checked.pages += 1;
        checked.mismatches += u64::from(wrong.is_some());
        checked.stale += u64::from(look.stale.is_some());
        checked.first_mismatch = checked.first_mismatch.or(wrong);
    }

    /// Writes every other word of a page.
    pub(crate) fn write(&self, number: u64, generation: NonZeroU32) {
        let page = self.page(number);
        let pattern = Pattern::of_writes(self.template.seed, generation.get());
        let state = page.state();
        let _no_other_changes = state.exclude_changes();
        let history = state.version().history();
        state.begin_change();
        let words = (page.start..)
            .step_by(WORD_SIZE)
            .zip((page.offset..page.offset + self.page_size).step_by(WORD_SIZE));
        for (at, offset) in words.filter(|(_, offset)| is_written(*offset)) {
            page.region.memory.store(at, pattern.word(offset));
        }
        state.end_change(History {
            written: Some(generation),
            ..history
        });
    }

    /// Gives a range of pages back, with one system call for each region.
    pub(crate) fn remove(&self, range: &Range<u64>) -> Result<()> {
        ensure!(range.end <= self.pages(), "{range:?} is not all within the guest");
        for region in &self.regions {
            let first = range.start.max(region.first_page);
            let last = range.end.min(region.last_page());
            if first < last {
                self.remove_in(region, first..last)
                    .with_context(|| format!("failed to remove {first}..{last}"))?;
            }
        }
        Ok(())
    }

    fn remove_in(&self, region: &GuestRegion, range: Range<u64>) -> Result<()> {
        let first = usize::try_from(range.start - region.first_page)?;
        let last = usize::try_from(range.end - region.first_page)?;
        let page_size = usize::try_from(self.page_size)?;
        let states = &region.states()[first..last];
        // In ascending order. No thread waits for a page while it has a higher one locked.
        let no_other_changes: Vec<_> = states.iter().map(PageState::exclude_changes).collect();
        states.iter().for_each(PageState::begin_change);
        let outcome = region.memory.remove(first * page_size..last * page_size);
        for state in states {
            let history = match outcome {
                Ok(()) => History {
                    removed: true,
                    written: None,
                },
                Err(_) => state.version().history(),
            };
            state.end_change(history);
        }
        drop(no_other_changes);
        Ok(outcome?)
    }

    fn page(&self, number: u64) -> Page<'_> {
        let region = self.regions.partition_point(|region| region.last_page() <= number);
        let region = &self.regions[region];
        let index = number - region.first_page;
        let start = index * self.page_size;
        let fits = "a page of a mapping";
        Page {
            number,
            region,
            index: usize::try_from(index).expect(fits),
            start: usize::try_from(start).expect(fits),
            offset: region.offset + start,
        }
    }

    fn look(&self, page: Page<'_>, history: History) -> Look {
        let written = history
            .written
            .map(|generation| Pattern::of_writes(self.template.seed, generation.get()));
        let mut look = Look::default();
        let mut at = page.start;
        for chunk in (page.offset..page.offset + self.page_size).step_by(LAYOUT_PAGE_LEN) {
            let template = self.template.expected(chunk);
            for offset in (chunk..chunk + LAYOUT_PAGE).step_by(WORD_SIZE) {
                let found = page.region.memory.load(at);
                let expected = match written {
                    Some(pattern) if is_written(offset) => pattern.word(offset),
                    _ if history.removed => 0,
                    _ => template.word(offset),
                };
                if found != expected {
                    let wrong = Mismatch {
                        page: page.number,
                        address: page.region.memory.range().start().get() + at as u64,
                        offset,
                        expected,
                        found,
                        history,
                    };
                    look.wrong.get_or_insert(wrong);
                    if history.removed && found != 0 && found == template.word(offset) {
                        look.stale.get_or_insert(wrong);
                    }
                }
                at += WORD_SIZE;
            }
        }
        look
    }
}

/// Returns `true` if a write to a page covers the word at this offset of the template. The words between keep their
/// content, which shows whether the page was right when the write faulted it in.
fn is_written(offset: u64) -> bool {
    (offset / WORD_SIZE as u64).is_multiple_of(2)
}
