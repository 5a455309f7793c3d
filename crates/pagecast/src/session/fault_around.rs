//! Fault-around: which pages near a fault will be used next.
//!
//! The faults of a region are sorted into *streams*: faults at equal distances, up or down. A fault of a stream installs a *window*
//! of further pages of the stream, but not the page right after the window. A fault there proves that the stream
//! goes on, and doubles the window. Faults that belong to no stream install one page.
//!
//! Unused pages are memory that the fork never gets back, so two things bound them. Pages of a window that no later
//! fault proves are a fraction of all pages that were asked for. And of some windows one page is *held out*: a stream that goes on
//! without a fault there uses only a part of its pages. If that happens often, the region gets no windows for a while.

use super::region::RegionIndex;
use crate::page::PageIndex;

/// The most pages of a window.
pub(super) const MOST_PAGES: usize = 64;

/// The streams that are followed at a time: one for each vCPU, and some more.
const STREAMS: usize = 16;

/// The longest distance between two faults of a stream, in pages.
const LONGEST_STRIDE: usize = 16;

/// The most pages of a window whose pages are not neighbours: each costs a system call.
const MOST_APART: usize = 8;

/// The limit of unproven pages: this number, and one for each `ASKED_PER_UNPROVEN` pages that were asked for.
const UNPROVEN_PAGES: u64 = 16;
const ASKED_PER_UNPROVEN: u64 = 8;

/// The shortest window of which a page is held out.
const SHORTEST_SAMPLED: usize = 4;

/// Once there are this many samples, a page is held out of one window in `SAMPLED_RARELY` only.
const ENOUGH_SAMPLES: u32 = 8;
const SAMPLED_RARELY: u32 = 8;

/// Once there are this many samples, older ones count half.
const MANY_SAMPLES: u32 = 64;

/// If more than one held-out page in `UNUSED_LIMIT` is unused, the next `PAUSE` faults get no windows.
const UNUSED_LIMIT: u32 = 6;
const PAUSE: u32 = 512;

/// The streams of a region, and how well they foresaw its faults.
#[derive(Debug, Default)]
pub(super) struct FaultAround {
    streams: [Stream; STREAMS],
    /// The number of faults so far.
    faults: u32,
    /// Pages that faulted, or are in a window that a later fault has proven.
    asked: u64,
    /// Pages of windows that no later fault has proven.
    unproven: u64,
    /// Windows of which a page could have been held out.
    windows: u32,
    used: u32,
    unused: u32,
    /// Faults until windows are tried again.
    pause: u32,
}

/// Faults at equal distances.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The last page that faulted.
    last: usize,
    /// The distance to the next fault in pages; 0 after the first fault.
    stride: isize,
    /// The page that proves the window: the first of the stream that is not installed.
    next: usize,
    /// The pages of the last window, the fault's included.
    width: usize,
    /// The pages of the last window that were installed ahead.
    ahead: u64,
    held_out: Option<usize>,
    /// The number of the last fault; 0 for an unused place.
    number: u32,
}

/// The pages to install for a fault: at equal distances, the page that faulted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) first: PageIndex,
    pub(super) stride: isize,
    /// The number of pages, at least one.
    pub(super) pages: usize,
    /// A page that is left out, to see whether it will be used.
    pub(super) held_out: Option<PageIndex>,
    /// The place of its stream.
    stream: usize,
}

impl Window {
    /// The page at this place of the window, also past its end.
    pub(super) fn page(&self, place: usize) -> Option<PageIndex> {
        let distance = self.stride.checked_mul(isize::try_from(place).ok()?)?;
        self.first.get().checked_add_signed(distance).map(PageIndex::new)
    }
}

/// The pages of a window that are still to be installed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    pub(super) region: RegionIndex,
    window: Window,
    /// A bit for each place.
    places: u64,
}

impl Ahead {
    /// Takes the pages of `window` for which `is_wanted` returns `true`. The page that faulted always is. A page that is not wanted is
    /// not held out either: it may never fault.
    pub(super) fn new(region: RegionIndex, mut window: Window, is_wanted: impl Fn(PageIndex) -> bool) -> Self {
        window.held_out = window.held_out.filter(|page| is_wanted(*page));
        let is_wanted = |place: &usize| {
            window
                .page(*place)
                .is_some_and(|page| Some(page) != window.held_out && is_wanted(page))
        };
        let places = (1..window.pages.min(MOST_PAGES)).filter(is_wanted);
        Self {
            region,
            window,
            places: places.fold(1, |places, place| places | 1 << place),
        }
    }

    /// The number of pages.
    pub(super) fn pages(&self) -> usize {
        self.places.count_ones() as usize
    }

    /// Takes the next neighbouring pages, as first page and count. The first ones contain the page that faulted.
    pub(super) fn take(&mut self) -> Option<(PageIndex, usize)> {
        let place = self.places.trailing_zeros();
        let neighbours = (self.places.checked_shr(place)?).trailing_ones();
        let count = match self.window.stride {
            1 | -1 => neighbours,
            _ => 1,
        };
        self.places &= !(u64::MAX >> (u64::BITS - count) << place);
        let last = place + count - 1;
        let first = if self.window.stride < 0 { last } else { place };
        Some((self.window.page(first as usize)?, count as usize))
    }
}

impl FaultAround {
    /// Notes a fault. Returns the pages to install for it, at most `most`; `None` if that is the page alone. A page that is not
    /// `wanted` continues a stream, but begins none.
    pub(super) fn on_fault(&mut self, page: PageIndex, wanted: bool, most: usize) -> Option<Window> {
        self.faults = self.faults.wrapping_add(1).max(1);
        self.asked += 1;
        self.pause = self.pause.saturating_sub(1);
        let place = self.follow(page.get(), wanted)?;
        let sample = self.samples_next();
        let budget = (UNPROVEN_PAGES + self.asked / ASKED_PER_UNPROVEN).saturating_sub(self.unproven);
        let stream = self.streams.get_mut(place)?;
        let neighbours = stream.stride.unsigned_abs() == 1;
        let most = if neighbours { most } else { most.min(MOST_APART) };
        let ahead = usize::try_from(budget).unwrap_or(usize::MAX);
        let width = stream.width.min(most).min(1 + ahead);
        stream.width = width.max(1);
        if width <= 1 || self.pause > 0 {
            stream.width = 1;
            stream.next = page.get().checked_add_signed(stream.stride)?;
            return None;
        }
        let mut window = Window {
            first: page,
            stride: stream.stride,
            pages: width,
            held_out: None,
            stream: place,
        };
        if width >= SHORTEST_SAMPLED {
            self.windows = self.windows.wrapping_add(1);
            if sample {
                // Any place but the first.
                let place = 1 + scatter(self.faults) % (width - 1);
                window.held_out = window.page(place);
            }
        }
        Some(window)
    }

    /// Notes the pages that are installed for a fault, and that `next` is the first page after the window that can fault.
    pub(super) fn on_planned(&mut self, planned: &Ahead, next: Option<PageIndex>) {
        let Some(stream) = self.streams.get_mut(planned.window.stream) else {
            return;
        };
        // Without the page that faulted.
        stream.ahead = planned.pages().saturating_sub(1) as u64;
        stream.held_out = planned.window.held_out.map(PageIndex::get);
        self.unproven += stream.ahead;
        match next {
            Some(next) => stream.next = next.get(),
            // The end of the region: the stream cannot go on.
            None => *stream = Stream::default(),
        }
    }

    /// Ends windows for a while: there is no memory for them.
    pub(super) fn pause(&mut self) {
        self.pause = PAUSE;
    }

    /// Returns the place of the stream that a fault belongs to, and widens its window if the fault was foreseen. `None`
    /// if the fault may be the first of a stream, or was held out.
    fn follow(&mut self, page: usize, wanted: bool) -> Option<usize> {
        let mut oldest = 0;
        let mut age = 0;
        let mut near = None;
        for (place, stream) in self.streams.iter_mut().enumerate() {
            if stream.number == 0 {
                (oldest, age) = (place, u32::MAX);
                continue;
            }
            if stream.stride != 0 {
                if stream.next == page {
                    stream.number = self.faults;
                    stream.last = page;
                    stream.width *= 2;
                    let unused = stream.held_out.take().is_some();
                    let ahead = std::mem::take(&mut stream.ahead);
                    self.unproven = self.unproven.saturating_sub(ahead);
                    self.asked += ahead;
                    if unused {
                        self.note_sample(false);
                    }
                    return Some(place);
                }
                if stream.held_out == Some(page) {
                    stream.held_out = None;
                    self.note_sample(true);
                    return None;
                }
            } else if near.is_none() && stream.last.abs_diff(page) <= LONGEST_STRIDE && stream.last != page {
                near = Some(place);
            }
            // A single fault is replaced before a stream.
            let this_age = self
                .faults
                .wrapping_sub(stream.number)
                .saturating_mul(if stream.stride == 0 { 64 } else { 1 });
            if this_age > age {
                (oldest, age) = (place, this_age);
            }
        }
        if !wanted {
            return None;
        }
        let number = self.faults;
        if let Some(place) = near
            && let Some(stream) = self.streams.get_mut(place)
        {
            stream.stride = page.cast_signed().wrapping_sub(stream.last.cast_signed());
            stream.last = page;
            stream.number = number;
            // Neighbours are used together far more often than pages at another distance.
            stream.width = if stream.stride.unsigned_abs() == 1 { 2 } else { 1 };
            return Some(place);
        }
        if let Some(stream) = self.streams.get_mut(oldest) {
            // The pages ahead of a stream that is given up stay unproven.
            *stream = Stream {
                last: page,
                number,
                ..Stream::default()
            };
        }
        None
    }

    /// Returns `true` if a page of the next window is to be held out.
    fn samples_next(&self) -> bool {
        self.used + self.unused < ENOUGH_SAMPLES || self.windows.is_multiple_of(SAMPLED_RARELY)
    }

    fn note_sample(&mut self, is_used: bool) {
        if is_used {
            self.used += 1;
        } else {
            self.unused += 1;
        }
        let all = self.used + self.unused;
        if all >= ENOUGH_SAMPLES && self.unused * UNUSED_LIMIT > all {
            self.pause = PAUSE;
        }
        if all >= MANY_SAMPLES || self.pause > 0 {
            self.used /= 2;
            self.unused /= 2;
        }
    }
}

/// A number that differs much for neighbouring `number`s.
fn scatter(number: u32) -> usize {
    (number.wrapping_mul(0x9E37_79B9) >> 16) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const MOST: usize = 32;

    /// A guest whose faults are answered with windows, in a region without end.
    #[derive(Default)]
    struct Guest {
        around: FaultAround,
        installed: BTreeSet<usize>,
        used: BTreeSet<usize>,
        faults: usize,
    }

    impl Guest {
        fn touch(&mut self, page: usize) {
            self.used.insert(page);
            if !self.installed.insert(page) {
                return;
            }
            self.faults += 1;
            let Some(window) = self.around.on_fault(PageIndex::new(page), true, MOST) else {
                return;
            };
            let installed = &mut self.installed;
            let mut ahead = Ahead::new(RegionIndex::FIRST, window, |page| !installed.contains(&page.get()));
            let next = (window.pages..)
                .map_while(|place| window.page(place))
                .find(|page| !installed.contains(&page.get()));
            self.around.on_planned(&ahead, next);
            while let Some((first, pages)) = ahead.take() {
                installed.extend(first.get()..first.get() + pages);
            }
        }

        fn touch_all(mut self, pages: impl IntoIterator<Item = usize>) -> Self {
            for page in pages {
                self.touch(page);
            }
            self
        }

        /// Installed pages that were not used, in percent of the used ones.
        fn waste(&self) -> usize {
            (self.installed.len() - self.used.len()) * 100 / self.used.len()
        }
    }

    #[test]
    fn a_guest_that_reads_in_order_faults_rarely_and_wastes_little() {
        for pages in [
            Box::new(1000..17_384_usize) as Box<dyn Iterator<Item = usize>>,
            Box::new((1000..17_384_usize).rev()),
        ] {
            let guest = Guest::default().touch_all(pages);
            assert!(guest.faults < 16_384 / 20, "{}", guest.faults);
            assert_eq!(guest.waste(), 0);
        }
    }

    #[test]
    fn several_vcpus_that_read_in_order_are_told_apart() {
        let pages = (0..4096).flat_map(|page| (0..8).map(move |vcpu| vcpu * 100_000 + page));
        let guest = Guest::default().touch_all(pages);
        assert!(guest.faults < 8 * 4096 / 15, "{}", guest.faults);
        assert!(guest.waste() <= 1, "{}", guest.waste());
    }

    #[test]
    fn equal_distances_are_followed_and_pages_between_are_left_alone() {
        for stride in [2, 3, 16] {
            let guest = Guest::default().touch_all((0..4096).map(|page| page * stride));
            assert!(guest.faults < 4096 / 6, "{}", guest.faults);
            assert_eq!(guest.waste(), 0);
        }
    }

    #[test]
    fn pages_that_are_there_already_do_not_count_as_unused() {
        let mut guest = Guest::default();
        let there = |page: &usize| page % 4 == 3;
        guest.installed.extend((0..16_384).filter(there));
        let guest = guest.touch_all(0..16_384);
        assert!(guest.faults < 16_384 / 15, "{}", guest.faults);
    }

    #[test]
    fn random_pages_are_installed_alone() {
        let mut random = fastrand::Rng::with_seed(1);
        let pages = (0..16_384).map(|_| random.usize(..1 << 20));
        let guest = Guest::default().touch_all(pages);
        assert!(guest.installed.len() - guest.faults <= 160, "{}", guest.installed.len());
    }

    #[test]
    fn guests_that_use_a_part_of_each_window_waste_a_bounded_part() {
        // Two pages of three, of four; one, three and five of eight; and some records of several pages, here and there.
        for (used, of) in [(2, 3), (2, 4), (1, 8), (3, 8), (5, 8), (7, 8), (9, 64), (40, 64)] {
            let pages = (0..16_384).filter(move |page| page % of < used);
            let guest = Guest::default().touch_all(pages);
            assert!(guest.waste() <= 25, "{used} of {of}: {}%", guest.waste());
        }
    }

    proptest! {
        /// Whatever a guest does, at most a quarter of what it uses is installed in vain, and some pages.
        #[test]
        fn waste_is_bounded(
            runs in proptest::collection::vec((0..20_000usize, 1..60usize, 1..9usize, any::<bool>()), 1..120),
        ) {
            let pages = runs.iter().flat_map(|(first, count, stride, up)| {
                let pages = (0..*count).map(move |page| first + page * stride);
                let (mut up_pages, mut down) = (pages.clone(), pages.rev());
                std::iter::from_fn(move || if *up { up_pages.next() } else { down.next() })
            });
            let guest = Guest::default().touch_all(pages);
            let wasted = guest.installed.len() - guest.used.len();
            prop_assert!(wasted * 4 <= guest.used.len() + 4 * 64, "{wasted} of {}", guest.used.len());
        }
    }
}
