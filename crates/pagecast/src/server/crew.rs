//! Threads that help to fill a fork when cores are free.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use procfs::{FromRead, LoadAverage};
use rayon::ThreadPool;

/// How many threads a server has for this at most, where nobody said: a bulk copy is bound by memory before it is by cores.
const MOST: usize = 3;

/// One for all workers of a server. Its threads sleep while there is nothing to do.
pub(super) struct Crew {
    /// None where there are no threads, as on a machine of one core.
    pool: Option<ThreadPool>,
    cores: usize,
    /// All of its threads are there to be used, whatever else runs on this host.
    always: bool,
    /// How many of its threads somebody has taken.
    busy: AtomicUsize,
    /// Says how many threads are running on this host.
    load: Option<File>,
}

impl Crew {
    /// So many threads that are always used, or some that are used while cores are free.
    pub(super) fn new(always: Option<usize>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = always.unwrap_or((cores - 1).min(MOST));
        let pool = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|index| format!("pagecast-fill-{index}"))
                .build()
        };
        Self {
            // Without these threads all goes on, on one core for each fork.
            pool: (threads > 0).then(pool).and_then(Result::ok),
            cores,
            always: always.is_some(),
            busy: AtomicUsize::new(0),
            load: File::open("/proc/loadavg").ok(),
        }
    }

    /// Takes as many of its threads as there are cores that nobody uses, for nobody else to count on.
    pub(super) fn take_free(&self) -> Helpers<'_> {
        Helpers {
            crew: self,
            count: self.reserve(),
        }
    }

    fn reserve(&self) -> usize {
        let threads = self.pool.as_ref().map_or(0, ThreadPool::current_num_threads);
        // Asked first, because it costs nothing.
        if self.busy.load(Ordering::Relaxed) >= threads {
            return 0;
        }
        let unused = if self.always {
            threads
        } else {
            let running = self.load.as_ref().and_then(running).unwrap_or(self.cores);
            self.cores.saturating_sub(running)
        };
        let free = |busy: usize| threads.saturating_sub(busy).min(unused);
        let before = self
            .busy
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |busy| Some(busy + free(busy)));
        // The update refuses nothing, so this is what it saw.
        free(before.unwrap_or_else(|busy| busy))
    }
}

/// Threads of the crew that are one's own until this is dropped.
pub(super) struct Helpers<'a> {
    crew: &'a Crew,
    count: usize,
}

impl Helpers<'_> {
    /// How many, beside this one.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Does all that is to be done, the first here and the others on these threads, and returns when all is done.
    pub(super) fn run<T: Send>(&self, mut work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
        let Some(pool) = self.crew.pool.as_ref().filter(|_| work.len() > 1) else {
            return work.into_iter().map(|work| work()).collect();
        };
        let others = work.split_off(1);
        let mut results: Vec<Option<T>> = others.iter().map(|_| None).collect();
        let own: Vec<T> = pool.in_place_scope(|scope| {
            for (other, result) in others.into_iter().zip(&mut results) {
                scope.spawn(|_| *result = Some(other()));
            }
            work.into_iter().map(|work| work()).collect()
        });
        own.into_iter().chain(results.into_iter().flatten()).collect()
    }
}

impl Drop for Helpers<'_> {
    fn drop(&mut self) {
        self.crew.busy.fetch_sub(self.count, Ordering::Relaxed);
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
        let crew = Crew::new(None);
        let numbers = |numbers: std::ops::Range<i32>| numbers.map(|number| move || number).collect::<Vec<_>>();
        for count in 0..5 {
            let all: Vec<i32> = (0..count).collect();
            assert_eq!(crew.take_free().run(numbers(0..count)), all);
        }
        assert_eq!(crew.busy.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn this_thread_is_running() {
        assert!(running(&File::open("/proc/loadavg").unwrap()).unwrap() >= 1);
    }

    #[test]
    fn no_more_threads_are_free_than_cores_beside_this_one() {
        let crew = Crew::new(None);
        assert!(crew.take_free().count() < crew.cores);
    }

    /// Who counts on a thread that is another's waits for as long as that one takes.
    #[test]
    fn a_thread_is_taken_by_one_at_a_time() {
        let crew = Crew::new(Some(2));
        let first = crew.take_free();
        let second = crew.take_free();
        assert_eq!((first.count(), second.count()), (2, 0));
        drop(first);
        assert_eq!(crew.take_free().count(), 2);
    }
}
