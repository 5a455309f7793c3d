//! Pages that are installed though no thread waits for them, and the progress of that.

use std::sync::Arc;

use pagecast_uffd::{ByteLen, Outcome};

use super::region::{RegionIndex, RegionMap};
use super::step::{After, Install};
use super::tracked_region::TrackedRegion;
use crate::page::{PageIndex, PageSize};
use crate::template::{PrefaultPlan, Run, TemplateOffset};

/// The most bytes that one fill spans, so that a demand fault never waits long behind it. Chunks of 64 KiB and more are
/// installed at the full speed of `UFFDIO_COPY`.
const FILL_BYTES: u64 = 256 * 1024;

/// A bounded piece of a prefault or of a completion: pages to install that no thread waits for.
///
/// Some pages may be installed or removed by the time of the install. So
/// [`Session::fill_parts`](super::Session::fill_parts) finds the parts to install anew each time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fill {
    pub(super) region: RegionIndex,
    pub(super) first: PageIndex,
    /// Everything before this page is installed or needs no install.
    pub(super) next: PageIndex,
    pub(super) end: PageIndex,
    /// The piece spans mappings that were split; the kernel installs into one at a time.
    pub(super) single_pages: bool,
    /// Zeros need no install: once a completed fork is unregistered, absent pages are zeros.
    pub(crate) skips_zeros: bool,
    /// The piece is of the working set: other forks have touched it.
    pub(crate) is_planned: bool,
    /// The template offset of its first page.
    pub(crate) from: TemplateOffset,
    /// The size of each page.
    pub(crate) page_size: PageSize,
}

impl Fill {
    /// The length of the whole piece in bytes, for a buffer.
    pub(crate) fn bytes(&self) -> usize {
        (self.end.get() - self.first.get()) * self.page_size.as_usize()
    }

    /// The offset of `part` within the bytes of this piece.
    pub(crate) fn position_of(&self, part: &Install) -> usize {
        part.at.page.get().saturating_sub(self.first.get()) * self.page_size.as_usize()
    }

    /// Notes that everything up to the end of this part needs no install any more.
    pub(crate) fn skip(&mut self, part: &Install) {
        self.next = PageIndex::new(part.at.page.get() + part.pages);
    }

    /// Notes the outcome of a part. Returns how many of its pages are there now, and what is left to do.
    pub(super) fn on_outcome(&mut self, part: &Install, outcome: Outcome) -> (usize, After) {
        let (installed, passed, after) = match outcome {
            Outcome::Installed => (part.pages, part.pages, After::Done),
            Outcome::AlreadyPresent => (1, 1, After::Done),
            Outcome::Retry { installed } => {
                let pages = pages_of(installed, part.page_size);
                (pages, pages, After::Parked)
            }
            // The kernel installs into one mapping at a time, and returns the same if a part spans two.
            Outcome::NotRegistered if part.pages > 1 => {
                self.single_pages = true;
                (0, 0, After::Done)
            }
            Outcome::NotRegistered => (0, 1, After::Done),
            Outcome::OutOfMemory => (0, 0, After::OutOfMemory),
            Outcome::PeerGone => (0, 0, After::PeerGone),
            Outcome::Failed(errno) => (0, 0, After::Failed(errno)),
        };
        self.next = PageIndex::new(part.at.page.get() + passed);
        (installed, after)
    }
}

/// The number of pages in `len`.
pub(super) fn pages_of(len: ByteLen, page_size: PageSize) -> usize {
    usize::try_from(len.get() / page_size.bytes()).unwrap_or(0)
}

/// The pages that a fork is to be filled with: its working set first, then the rest.
#[derive(Debug, Default)]
pub(super) struct Filling {
    working_set: Option<PlanCursor>,
    rest: Option<RestCursor>,
    /// Everything is to be installed, and the fork stays registered.
    all: bool,
    completion: Option<Completion>,
    /// The kernel fills absent, unregistered pages with zeros in pages of 4 KiB, not in larger ones.
    kernel_fills_small: bool,
}

/// A completion that was begun and not abandoned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    /// As fast as possible, because a caller waits.
    pub(crate) at_once: bool,
    /// All regions are unregistered. Still open: whether a thread of the VMM waits for us.
    pub(crate) is_unregistered: bool,
}

/// How much of a plan has been handed out.
#[derive(Debug)]
struct PlanCursor {
    plan: Arc<PrefaultPlan>,
    run: usize,
    /// The bytes of that run that were handed out.
    into: u64,
}

impl PlanCursor {
    /// The next bytes of the template to install.
    fn take(&mut self) -> Option<Run> {
        loop {
            let run = self.plan.runs().get(self.run)?;
            let at = TemplateOffset::new(run.at.get() + self.into);
            let left = run.len.get() - self.into;
            if left == 0 {
                self.run += 1;
                self.into = 0;
                continue;
            }
            let len = self.plan.until_held_out(at, left.min(FILL_BYTES));
            if len == 0 {
                self.into += PageSize::SMALLEST;
                continue;
            }
            self.into += len;
            return Some(Run {
                at,
                len: ByteLen::new(len),
            });
        }
    }
}

/// How much of a fork's memory has been handed out.
#[derive(Clone, Copy, Debug)]
struct RestCursor {
    region: RegionIndex,
    page: PageIndex,
}

impl RestCursor {
    const START: Self = Self {
        region: RegionIndex::FIRST,
        page: PageIndex::new(0),
    };
}

impl Filling {
    pub(super) fn begin_working_set(&mut self, plan: Arc<PrefaultPlan>) {
        self.working_set = Some(PlanCursor { plan, run: 0, into: 0 });
    }

    pub(super) fn begin_all(&mut self) {
        self.all = true;
        self.rest = Some(RestCursor::START);
    }

    /// Ends prefaulting; a completion continues.
    pub(super) fn stop_prefault(&mut self) {
        self.working_set = None;
        self.all = false;
        if self.completion.is_none() {
            self.rest = None;
        }
    }

    pub(super) fn begin_completion(&mut self, at_once: bool) {
        if let Some(completion) = &mut self.completion {
            completion.at_once = at_once;
            return;
        }
        self.completion = Some(Completion {
            at_once,
            is_unregistered: false,
        });
        self.rest = Some(RestCursor::START);
    }

    pub(super) fn set_unregistered(&mut self) {
        if let Some(completion) = &mut self.completion {
            completion.is_unregistered = true;
        }
    }

    /// Abandons the completion; a prefault continues.
    pub(super) fn abandon_completion(&mut self) {
        self.completion = None;
        if !self.all {
            self.rest = None;
        }
    }

    /// Notes that the kernel fills in zeros in pages of 4 KiB.
    pub(super) fn set_kernel_fills_small(&mut self) {
        self.kernel_fills_small = true;
    }

    pub(super) fn completion(&self) -> Option<Completion> {
        self.completion
    }

    /// Returns `true` if [`next`](Self::next) may have a piece.
    pub(super) fn is_wanted(&self) -> bool {
        self.working_set.is_some() || self.rest.is_some()
    }

    /// The next piece; each is returned once. `None` if everything has been handed out.
    pub(super) fn next(&mut self, regions: &RegionMap<TrackedRegion>) -> Option<Fill> {
        let fill = |index: RegionIndex, first: PageIndex, end: usize, is_planned, skips_zeros| {
            let region = &regions.get(index)?.region;
            Some(Fill {
                region: index,
                first,
                next: first,
                end: PageIndex::new(end),
                single_pages: false,
                skips_zeros,
                is_planned,
                from: region.offset_of(first),
                page_size: region.page_size(),
            })
        };
        while let Some(cursor) = &mut self.working_set {
            let Some(run) = cursor.take() else {
                self.working_set = None;
                break;
            };
            for (index, first, pages) in regions.pages_of_template(run.at, run.len) {
                let end = first.get() + pages;
                let absent = regions.get(index)?.states.next_absent(first, 1);
                if absent.is_some_and(|(absent, _)| absent.get() < end) {
                    return fill(index, first, end, true, false);
                }
            }
        }
        while let Some(cursor) = &mut self.rest {
            let Some(TrackedRegion { region, states, .. }) = regions.get(cursor.region) else {
                self.rest = None;
                break;
            };
            let Some((first, _)) = states.next_absent(cursor.page, 1) else {
                *cursor = RestCursor {
                    region: cursor.region.next(),
                    page: PageIndex::new(0),
                };
                continue;
            };
            let most = usize::try_from(FILL_BYTES / region.page_size().bytes()).map_or(1, |pages| pages.max(1));
            let end = (first.get() + most).min(region.pages());
            cursor.page = PageIndex::new(end);
            // hugetlbfs has one size of pages, whether the kernel or the server fills them.
            let fills_small = self.kernel_fills_small || region.page_size() == PageSize::Huge;
            let skips_zeros = self.completion.is_some() && fills_small;
            return fill(cursor.region, first, end, false, skips_zeros);
        }
        None
    }
}
