//! Threads that help to fill a fork when cores are free.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use procfs::{FromRead, LoadAverage};
use rayon::ThreadPool;

/// How many threads a server has for this at most: a bulk copy is bound by memory before it is by cores.
const MOST: usize = 3;

/// One for all workers of a server. Its threads sleep while there is nothing to do.
pub(super) struct Crew {
    /// None on a machine of one core.
    pool: Option<ThreadPool>,
    cores: usize,
    /// How many of its threads are at work.
    busy: AtomicUsize,
    /// Says how many threads are running on this host.
    load: Option<File>,
}

impl Crew {
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores - 1).min(MOST);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("pagecast-fill-{index}"))
            .build();
        Self {
            // Without these threads all goes on, on one core for each fork.
            pool: pool.ok().filter(|_| threads > 0),
            cores,
            busy: AtomicUsize::new(0),
            load: File::open("/proc/loadavg").ok(),
        }
    }

    /// How many of its threads may be used now: as many as there are cores that nobody uses.
    pub(super) fn free(&self) -> usize {
        let Some(pool) = &self.pool else { return 0 };
        let idle = pool
            .current_num_threads()
            .saturating_sub(self.busy.load(Ordering::Relaxed));
        if idle == 0 {
            return 0;
        }
        let running = self.load.as_ref().and_then(running).unwrap_or(self.cores);
        idle.min(self.cores.saturating_sub(running))
    }

    /// Does all that is to be done, the first here and the others on threads of the crew, and returns when all is done.
    pub(super) fn run<T: Send>(&self, mut work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
        let Some(pool) = self.pool.as_ref().filter(|_| work.len() > 1) else {
            return work.into_iter().map(|work| work()).collect();
        };
        let others = work.split_off(1);
        self.busy.fetch_add(others.len(), Ordering::Relaxed);
        let mut results: Vec<Option<T>> = others.iter().map(|_| None).collect();
        let helpers = others.len();
        let own: Vec<T> = pool.in_place_scope(|scope| {
            for (other, result) in others.into_iter().zip(&mut results) {
                scope.spawn(|_| *result = Some(other()));
            }
            work.into_iter().map(|work| work()).collect()
        });
        self.busy.fetch_sub(helpers, Ordering::Relaxed);
        own.into_iter().chain(results.into_iter().flatten()).collect()
    }
}

/// How many threads are running or want to, this one too.
fn running(load: &File) -> Option<usize> {
    // Held open and read from its beginning: opening it takes longer than all the rest.
    let mut buffer = [0; 128];
    let length = load.read_at(&mut buffer, 0).ok()?;
    let load = LoadAverage::from_read(buffer.get(..length)?).ok()?;
    usize::try_from(load.cur).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_done_and_comes_back_in_order() {
        let crew = Crew::new();
        let numbers = |numbers: std::ops::Range<i32>| numbers.map(|number| move || number).collect::<Vec<_>>();
        for count in 0..5 {
            let all: Vec<i32> = (0..count).collect();
            assert_eq!(crew.run(numbers(0..count)), all);
        }
        assert_eq!(crew.busy.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn this_thread_is_running() {
        assert!(running(&File::open("/proc/loadavg").unwrap()).unwrap() >= 1);
    }

    #[test]
    fn no_more_threads_are_free_than_cores_beside_this_one() {
        let crew = Crew::new();
        assert!(crew.free() < crew.cores);
    }
}
