//! Work of a connected simulated VMM on its memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::guest::Guest;
use super::protocol::{
    Checked, Latency, LatencyReport, Order, Pages, RaceReport, Read, ReadReport, RemoveRace, Share, Touch, Touched,
    Visit, Visited, Write,
};
use crate::memory::{GuestMemory, PageSize};
use crate::peer::micros;

/// Most pages that a race removes at once.
const LONGEST_REMOVAL: u64 = 32;

/// Number of removals in a burst, and most visits between two bursts.
///
/// While removals follow each other, no install succeeds (`UFFDIO_COPY` gives `EAGAIN`). Without a pause the readers
/// would all wait, and nothing would race.
const LONGEST_BURST: u64 = 8;

/// In a race, one visit in this many is of another page than the next.
const JUMP_ONE_IN: u32 = 16;

/// One visit of a race in this number is a write.
const WRITE_ONE_IN: u32 = 8;

/// State that the threads of a race share.
#[derive(Default)]
struct Race {
    over: AtomicBool,
    /// The current page of each reader.
    visiting: Vec<AtomicU64>,
    visits: AtomicU64,
    writes: AtomicU64,
}

pub(crate) fn read(guest: &Guest, read: &Read) -> Result<ReadReport> {
    let pages = select(guest, &read.pages)?;
    let threads = read.threads.max(1);
    let started = Instant::now();
    let mut checked = Checked::default();
    for pass in 0..read.passes {
        let lists = spread(&pages, threads, read.order, read.share, pass);
        checked.merge(&check_all(guest, &lists));
    }
    Ok(ReadReport {
        checked,
        elapsed_us: micros(started.elapsed()),
    })
}

pub(crate) fn write(guest: &Guest, write: &Write) -> Result<Touched> {
    ensure!(
        write.generation.leading_zeros() > 0,
        "generation {} is not below 2^31",
        write.generation
    );
    let pages = select(guest, &write.pages)?;
    let lists = spread(&pages, write.threads.max(1), Order::Sequential, Share::Divided, 0);
    Ok(visit_all(&lists, |page| guest.write(page, write.generation)))
}

pub(crate) fn touch(guest: &Guest, touch: &Touch) -> Result<Touched> {
    let pages = select(guest, &touch.pages)?;
    let lists = spread(&pages, touch.threads.max(1), touch.order, Share::Divided, 0);
    Ok(visit_all(&lists, |page| guest.touch(page)))
}

pub(crate) fn visit(guest: &Guest, visit: &Visit) -> Result<Visited> {
    for run in &visit.runs {
        ensure!(
            run.end <= guest.pages(),
            "pages {run:?} of a guest that has {}",
            guest.pages()
        );
    }
    let started = Instant::now();
    for run in visit.runs.iter().cloned() {
        if visit.write {
            run.for_each(|page| guest.scribble(page));
        } else {
            run.for_each(|page| guest.touch(page));
        }
    }
    Ok(Visited {
        elapsed_ns: nanos(started.elapsed()),
        pages: visit.runs.iter().map(|run| run.end.saturating_sub(run.start)).sum(),
    })
}

pub(crate) fn latency(guest: &Guest, latency: &Latency) -> Result<LatencyReport> {
    let pages = select(guest, &latency.pages)?;
    ensure!(!pages.is_empty(), "no pages to measure");
    let lists = spread(&pages, 1, latency.order, Share::Divided, 0);
    let mut times = Vec::with_capacity(pages.len());
    let started = Instant::now();
    for page in lists.into_iter().flatten() {
        let before = Instant::now();
        guest.touch(page);
        times.push(nanos(before.elapsed()));
    }
    let total_ns = nanos(started.elapsed());
    times.sort_unstable();
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
    Ok(LatencyReport {
        count: times.len() as u64,
        p50_ns: percentile(50),
        p90_ns: percentile(90),
        p99_ns: percentile(99),
        max_ns: percentile(100),
        total_ns,
    })
}

pub(crate) fn remove_race(guest: &Guest, race: &RemoveRace) -> Result<RaceReport> {
    let started = Instant::now();
    let end = started + Duration::from_millis(race.millis);
    let threads = race.threads.max(1);
    let state = Race {
        visiting: (0..threads).map(|_| AtomicU64::new(0)).collect(),
        ..Race::default()
    };
    let remover = std::thread::current();
    let (mut checked, removals) = std::thread::scope(|scope| {
        let readers = (1..).zip(&state.visiting).map(|(thread, at)| {
            let random = fastrand::Rng::with_seed(race.seed.wrapping_add(thread));
            let (state, remover) = (&state, &remover);
            scope.spawn(move || visit_until(guest, random, at, state, remover))
        });
        let readers: Vec<_> = readers.collect();
        let removals = remove_until(guest, fastrand::Rng::with_seed(race.seed), &state, end);
        // Before any step that can fail: the readers wait for it.
        state.over.store(true, Ordering::Relaxed);
        (join_all(readers), removals)
    });
    // Checks the pages of installs that came too late for the readers above.
    let all: Vec<u64> = (0..guest.pages()).collect();
    checked.merge(&check_all(guest, &[all]));
    Ok(RaceReport {
        checked,
        removals: removals?,
        writes: state.writes.into_inner(),
        elapsed_us: micros(started.elapsed()),
    })
}

/// Registers all memory with the guest's userfaultfd, until the races are over.
pub(crate) fn register_again(guest: &Guest) -> Result<()> {
    let uffd = guest.kept_uffd()?;
    while !guest.races_are_over.load(Ordering::Relaxed) {
        guest
            .regions
            .iter()
            .try_for_each(|region| region.memory.register(uffd))?;
    }
    Ok(())
}

/// Registers one more page with the guest's userfaultfd and touches it.
pub(crate) fn touch_outside(guest: &Guest) -> Result<()> {
    let uffd = guest.kept_uffd()?;
    let memory = GuestMemory::map(PageSize::Base.bytes(), PageSize::Base)?;
    memory.register(uffd)?;
    memory.load(0);
    Ok(())
}

/// Checks random pages, and writes to some, until the end of the race.
fn visit_until(guest: &Guest, mut random: fastrand::Rng, at: &AtomicU64, race: &Race, remover: &Thread) -> Checked {
    let mut checked = Checked::default();
    let mut page = 0;
    while !race.over.load(Ordering::Relaxed) {
        // Some pages in order, which a server may foresee, then others elsewhere.
        page = if random.u32(0..JUMP_ONE_IN) == 0 {
            random.u64(0..guest.pages())
        } else {
            (page + 1) % guest.pages()
        };
        at.store(page, Ordering::Relaxed);
        if random.u32(0..WRITE_ONE_IN) == 0 {
            let generation = std::num::NonZeroU32::MIN.saturating_add(random.u32(0..1 << 30));
            guest.write(page, generation);
            race.writes.fetch_add(1, Ordering::Relaxed);
        } else {
            guest.check(page, &mut checked);
        }
        race.visits.fetch_add(1, Ordering::Relaxed);
        remover.unpark();
    }
    checked
}

/// Removes random ranges, burst by burst, until the time is over, and returns their number. Does not end while every
/// reader waits: the caller has a deadline for that.
fn remove_until(guest: &Guest, mut random: fastrand::Rng, race: &Race, end: Instant) -> Result<u64> {
    let mut removals = 0;
    while Instant::now() < end && !guest.races_are_over.load(Ordering::Relaxed) {
        let burst = random.u64(1..=LONGEST_BURST);
        for _ in 0..burst {
            let length = random.u64(1..=LONGEST_REMOVAL);
            // Half of them are around a page that a reader may be waiting for, where bugs are most likely.
            let start = if random.bool() {
                random.u64(0..guest.pages())
            } else {
                let reader = &race.visiting[random.usize(0..race.visiting.len())];
                reader.load(Ordering::Relaxed).saturating_sub(random.u64(0..length))
            };
            guest.remove(&(start..guest.pages().min(start + length)))?;
        }
        removals += burst;
        let enough = race.visits.load(Ordering::Relaxed) + random.u64(1..=LONGEST_BURST);
        while race.visits.load(Ordering::Relaxed) < enough {
            std::thread::park();
        }
    }
    Ok(removals)
}

fn check_all(guest: &Guest, lists: &[Vec<u64>]) -> Checked {
    std::thread::scope(|scope| {
        let readers = lists.iter().map(|list| {
            scope.spawn(move || {
                let mut checked = Checked::default();
                for page in list {
                    guest.check(*page, &mut checked);
                }
                checked
            })
        });
        join_all(readers.collect())
    })
}

fn join_all(readers: Vec<std::thread::ScopedJoinHandle<'_, Checked>>) -> Checked {
    let mut all = Checked::default();
    for reader in readers {
        all.merge(&reader.join().expect("checking a page does not panic"));
    }
    all
}

fn visit_all(lists: &[Vec<u64>], visit: impl Fn(u64) + Sync) -> Touched {
    let started = Instant::now();
    std::thread::scope(|scope| {
        for list in lists {
            scope.spawn(|| list.iter().for_each(|page| visit(*page)));
        }
    });
    Touched {
        pages: lists.iter().map(|list| list.len() as u64).sum(),
        elapsed_us: micros(started.elapsed()),
    }
}

fn select(guest: &Guest, pages: &Pages) -> Result<Vec<u64>> {
    let Range { start, end } = pages.start..pages.end.unwrap_or(guest.pages());
    ensure!(
        start <= end && end <= guest.pages(),
        "pages {start}..{end} of a guest that has {}",
        guest.pages()
    );
    Ok((start..end).step_by(usize::try_from(pages.every.get())?).collect())
}

/// The pages of each thread, in its order.
fn spread(pages: &[u64], threads: usize, order: Order, share: Share, pass: u32) -> Vec<Vec<u64>> {
    let shuffled = |stream: usize| {
        let mut pages = pages.to_vec();
        if let Order::Random(seed) = order {
            let seed = seed.wrapping_add(u64::from(pass) << 32).wrapping_add(stream as u64);
            fastrand::Rng::with_seed(seed).shuffle(&mut pages);
        }
        pages
    };
    match share {
        Share::Everything => (0..threads).map(shuffled).collect(),
        Share::Divided => {
            let pages = shuffled(0);
            (0..threads)
                .map(|thread| pages.iter().copied().skip(thread).step_by(threads).collect())
                .collect()
        }
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Checked {
    fn merge(&mut self, other: &Self) {
        self.pages += other.pages;
        self.mismatches += other.mismatches;
        self.stale += other.stale;
        self.first_mismatch = self.first_mismatch.or(other.first_mismatch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_visited_by_one_thread_or_by_each() {
        let pages: Vec<u64> = (0..101).collect();
        let mut divided = spread(&pages, 4, Order::Random(1), Share::Divided, 0).concat();
        divided.sort_unstable();
        assert_eq!(divided, pages);
        let everything = spread(&pages, 3, Order::Random(1), Share::Everything, 0);
        assert_eq!(everything.len(), 3);
        for mut list in everything {
            assert_ne!(list, pages, "shuffled");
            list.sort_unstable();
            assert_eq!(list, pages);
        }
    }
}
