//! What is installed though nobody waits for it, and how far that has come.

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

/// Pages to install that nobody waits for: a bounded piece of a prefault or of a completion.
///
/// Some of them may be there, or removed, by the time it is tried, so what is really installed comes from
/// [`Session::fill_parts`](super::Session::fill_parts), each time anew.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fill {
    pub(super) region: RegionIndex,
    pub(super) first: PageIndex,
    /// Everything before this is installed or needs not be.
    pub(super) next: PageIndex,
    pub(super) end: PageIndex,
    /// It spans mappings that were split, and the kernel installs into one at a time.
    pub(super) single_pages: bool,
    /// Zeros need not be installed: once a completed fork is unregistered, what is absent is zeros by itself.
    pub(crate) skips_zeros: bool,
    /// It is of the working set: other forks have touched it.
    pub(crate) is_planned: bool,
    /// Where the bytes of its first page are in the template.
    pub(crate) from: TemplateOffset,
    /// The size of each page.
    pub(crate) page_size: PageSize,
}

impl Fill {
    /// The length of all of it, for a buffer.
    pub(crate) fn bytes(&self) -> usize {
        (self.end.get() - self.first.get()) * self.page_size.as_usize()
    }

    /// Where `part`, a part of this, lies within its bytes.
    pub(crate) fn position_of(&self, part: &Install) -> usize {
        part.at.page.get().saturating_sub(self.first.get()) * self.page_size.as_usize()
    }

    /// Everything up to the end of this part needs nothing any more.
    pub(crate) fn skip(&mut self, part: &Install) {
        self.next = PageIndex::new(part.at.page.get() + part.pages);
    }

    /// Takes note of what came of a part of it: how many of its pages are there now, and what is left to do.
    pub(super) fn on_outcome(&mut self, part: &Install, outcome: Outcome) -> (usize, After) {
        let (installed, passed, after) = match outcome {
            Outcome::Installed => (part.pages, part.pages, After::Done),
            Outcome::AlreadyPresent => (1, 1, After::Done),
            Outcome::Retry { installed } => {
                let pages = pages_of(installed, part.page_size);
                (pages, pages, After::Parked)
            }
            // The kernel installs into one mapping at a time and says the same where a part spans two.
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

fn pages_of(len: ByteLen, page_size: PageSize) -> usize {
    usize::try_from(len.get() / page_size.bytes()).unwrap_or(0)
}

/// What a fork is to be filled with: its working set first, then the rest.
#[derive(Debug, Default)]
pub(super) struct Filling {
    working_set: Option<PlanCursor>,
    rest: Option<RestCursor>,
    /// Everything is wanted, without letting go of it.
    all: bool,
    completion: Option<Completion>,
    /// What is absent and not registered is filled by the kernel with zeros of 4 KiB, not with larger pages.
    kernel_fills_small: bool,
}

/// A completion that was begun and not given up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    /// As fast as can be, because somebody waits.
    pub(crate) at_once: bool,
    /// All regions are unregistered. What is left is to be sure that no thread of the VMM waits for us.
    pub(crate) is_unregistered: bool,
}

/// How far a plan has been handed out.
#[derive(Debug)]
struct PlanCursor {
    plan: Arc<PrefaultPlan>,
    run: usize,
    /// Bytes of that run.
    into: u64,
}

impl PlanCursor {
    /// The next bytes of the template that are to be installed.
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

    /// Nothing is to be prefaulted any more; a completion goes on.
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

    /// A prefault goes on.
    pub(super) fn abandon_completion(&mut self) {
        self.completion = None;
        if !self.all {
            self.rest = None;
        }
    }

    /// The kernel fills in zeros in pages of 4 KiB.
    pub(super) fn set_kernel_fills_small(&mut self) {
        self.kernel_fills_small = true;
    }

    pub(super) fn completion(&self) -> Option<Completion> {
        self.completion
    }

    /// Whether [`next`](Self::next) may have something.
    pub(super) fn is_wanted(&self) -> bool {
        self.working_set.is_some() || self.rest.is_some()
    }

    /// The next piece, once. `None` where everything that is wanted has been handed out.
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
            let Some(TrackedRegion { region, states }) = regions.get(cursor.region) else {
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
