//! Merging, forgetting and putting together.

use proptest::prelude::*;

use super::*;

const CHUNK: u64 = 256 * 1024;

fn pages(count: usize) -> ByteLen {
    ByteLen::new(count as u64 * PageSize::SMALLEST)
}

fn page(number: usize) -> TemplateOffset {
    TemplateOffset::new(number as u64 * PageSize::SMALLEST)
}

/// A recording of a template of 10,000 pages.
fn recording(touched: impl IntoIterator<Item = usize>) -> Recording {
    let mut recording = Recording::new(pages(10_000));
    for number in touched {
        recording.push(page(number));
    }
    recording
}

fn numbers(set: &WorkingSet) -> Vec<u64> {
    set.pages().map(|at| at.get() / PageSize::SMALLEST).collect()
}

#[test]
fn one_recording_keeps_its_order() {
    let set = WorkingSet::of(&recording([900, 3, 77, 4]));
    assert_eq!(numbers(&set), [900, 3, 77, 4]);
    assert_eq!((set.size(), set.recordings()), (pages(4), 1));
}

#[test]
fn recordings_of_different_length_are_merged_by_relative_rank() {
    let mut set = WorkingSet::of(&recording(0..100));
    set.merge(&recording([1000, 50, 2000]));
    let order = numbers(&set);
    let place = |number: u64| order.iter().position(|page| *page == number).unwrap();
    assert!(place(1000) <= 1);
    assert!(place(2000) > place(60) && place(2000) < place(75));
    assert_eq!(order.len(), 102);
}

#[test]
fn what_forks_stop_touching_is_forgotten() {
    let mut set = WorkingSet::of(&recording(0..10));
    for _ in 0..20 {
        set.merge(&recording(0..10));
    }
    for _ in 0..MOST_WEIGHT {
        assert!(numbers(&set).contains(&0));
        set.merge(&recording(10..20));
    }
    assert_eq!(numbers(&set), (10..20).collect::<Vec<_>>());
}

#[test]
fn a_page_that_one_fork_touched_by_chance_goes_soon_and_one_that_every_second_touches_stays() {
    let mut set = WorkingSet::of(&recording([1, 2, 3]));
    for round in 0..20 {
        set.merge(&recording(if round % 2 == 0 { vec![1] } else { vec![1, 2] }));
        assert!(numbers(&set).contains(&2));
        assert_eq!(numbers(&set).contains(&3), round < usize::from(GAIN) - 1);
    }
}

#[test]
fn a_recording_that_tells_nothing_changes_nothing() {
    let mut set = WorkingSet::of(&recording([1, 2, 3]));
    let before = set.clone();
    set.merge(&recording([]));
    let mut other = Recording::new(pages(4));
    other.push(page(0));
    set.merge(&other);
    assert_eq!(set, before);
}

#[test]
fn a_fork_that_ended_when_it_had_hardly_begun_tells_nothing() {
    let cut_short = |touched| {
        let mut recording = recording(touched);
        recording.cut_short();
        recording
    };
    let mut set = WorkingSet::of(&recording(0..100));
    let before = set.clone();
    set.merge(&cut_short(0..49));
    assert_eq!(set, before);
    // One that was not cut short touched nothing else.
    assert!(set.learns_from(&recording(0..49)));
    // Forks that always end early are learned from.
    set.merge(&cut_short(50..100));
    assert_eq!(set.recordings(), 2);
}

#[test]
fn where_there_are_too_many_pages_those_that_more_forks_touch_stay() {
    let most = Recording::MOST_PAGES;
    let of = |touched: std::ops::Range<usize>| {
        let mut recording = Recording::new(pages(3 * most));
        for number in touched {
            recording.push(page(number));
        }
        recording
    };
    let mut set = WorkingSet::of(&of(0..most));
    set.merge(&of(most / 2..most / 2 + most));
    assert_eq!(set.size(), pages(most));
    let kept = numbers(&set);
    let common = (most / 2..most).map(|number| number as u64);
    let kept: std::collections::HashSet<_> = kept.into_iter().collect();
    assert!(common.into_iter().all(|number| kept.contains(&number)));
}

#[test]
fn a_template_takes_only_a_working_set_of_its_own_length() {
    let template = crate::Template::from_source(std::sync::Arc::new(Empty {
        len: pages(10_000),
        zeros: crate::template::ZeroMap::new(pages(10_000)),
    }));
    let set = std::sync::Arc::new(WorkingSet::of(&recording([1])));
    template.set_working_set(Some(std::sync::Arc::clone(&set)));
    assert_eq!(template.working_set(), Some(set));
    let other = WorkingSet::of(&Recording::new(pages(10_001)));
    template.set_working_set(Some(std::sync::Arc::new(other)));
    assert_eq!(template.working_set(), None);
}

#[test]
fn a_consecutive_set_touched_in_any_order_is_few_runs() {
    let mut order: Vec<usize> = (0..1024).collect();
    fastrand::Rng::with_seed(7).shuffle(&mut order);
    let first = order[0];
    let set = WorkingSet::of(&recording(order));
    assert_eq!(set.runs().len(), 1024 / 64);
    assert!(set.runs().iter().all(|run| run.len.get() == CHUNK));
    assert_eq!(set.runs()[0].at, page(first - first % 64));
}

/// A template that is never read.
struct Empty {
    len: ByteLen,
    zeros: crate::template::ZeroMap,
}

impl crate::template::PageSource for Empty {
    fn len(&self) -> ByteLen {
        self.len
    }
    fn try_read<'a>(
        &'a self,
        _: TemplateOffset,
        _: &'a mut [u8],
    ) -> Result<crate::template::Page<'a>, crate::template::SourceError> {
        Ok(crate::template::Page::Zero)
    }
    fn read(&self, _: TemplateOffset, buffer: &mut [u8]) -> Result<(), crate::template::SourceError> {
        buffer.fill(0);
        Ok(())
    }
    fn check_unchanged(&self) -> Result<(), crate::template::SourceError> {
        Ok(())
    }
    fn zeros(&self) -> &crate::template::ZeroMap {
        &self.zeros
    }
}

proptest! {
    #[test]
    fn runs_hold_each_page_once_within_chunks_in_the_order_of_first_touch(
        touched in proptest::collection::vec(0..400usize, 1..300),
        later in proptest::collection::vec(0..400usize, 0..300),
    ) {
        let mut set = WorkingSet::of(&recording(touched));
        set.merge(&recording(later));
        let mut place = std::collections::HashMap::new();
        for (index, at) in set.pages().enumerate() {
            prop_assert!(place.insert(at.get(), index).is_none());
        }
        let mut earliest_before = None;
        for run in set.runs() {
            let (at, end) = (run.at.get(), run.at.get() + run.len.get());
            prop_assert!(at < end && PageSize::Small.is_aligned(at) && PageSize::Small.is_aligned(end));
            prop_assert_eq!(at / CHUNK, (end - 1) / CHUNK);
            // Each page is in the set, and in no other run.
            let places: Option<Vec<usize>> = (at..end).step_by(4096).map(|at| place.remove(&at)).collect();
            let earliest = places.and_then(|places| places.into_iter().min());
            prop_assert!(earliest.is_some() && earliest > earliest_before);
            earliest_before = earliest;
        }
        prop_assert!(place.is_empty());
        // As long as possible: no two runs of a chunk touch.
        for run in set.runs() {
            let end = run.at.get() + run.len.get();
            prop_assert!(end % CHUNK == 0 || set.runs().iter().all(|other| other.at.get() != end));
        }
    }
}
