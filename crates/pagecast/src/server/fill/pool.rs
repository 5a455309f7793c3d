//! Threads that help to fill a fork when cores are free.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use procfs::{FromRead, LoadAverage};
use rayon::ThreadPool;

/// The most threads of a pool whose size was not set: memory bandwidth limits a bulk copy before cores do.
const MOST: usize = 3;

/// The threads that all workers of a server fill forks with. They sleep without work.
pub(in crate::server) struct FillPool {
    /// `None` if there are no threads, as on a machine with one core.
    threads: Option<ThreadPool>,
    cores: usize,
    /// All threads are used, whatever else runs on this host.
    always: bool,
    /// The number of threads that are taken.
    busy: AtomicUsize,
    /// `/proc/loadavg`, which says how many threads are running on this host.
    load: Option<File>,
}

impl FillPool {
    /// Creates a pool of `always` threads that are always used; or, for `None`, of threads that are used while cores
    /// are free.
    pub(in crate::server) fn new(always: Option<usize>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = always.unwrap_or((cores - 1).min(MOST));
        let pool = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|index| format!("pagecast-fill-{index}"))
                .build()
        };
        Self {
            // Without these threads, each fork is filled on one core.
            threads: (threads > 0).then(pool).and_then(Result::ok),
            cores,
            always: always.is_some(),
            busy: AtomicUsize::new(0),
            load: File::open("/proc/loadavg").ok(),
        }
    }

    /// Takes as many threads as there are unused cores. No other caller gets them meanwhile.
    pub(in crate::server) fn take_free(&self) -> FillThreads<'_> {
        FillThreads {
            pool: self,
            count: self.reserve(),
        }
    }

    fn reserve(&self) -> usize {
        let threads = self.threads.as_ref().map_or(0, ThreadPool::current_num_threads);
        // Checked first, because it costs nothing.
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
        // The update never fails, so `before` is the value that it saw.
        free(before.unwrap_or_else(|busy| busy))
    }
}

/// Threads of the pool that are taken until this is dropped.
pub(in crate::server) struct FillThreads<'a> {
    pool: &'a FillPool,
    count: usize,
}

impl FillThreads<'_> {
    /// The number of threads, beside the calling one.
    pub(in crate::server) fn count(&self) -> usize {
        self.count
    }

    /// Carries out all of `work`, the first on the calling thread and the others on these, and returns when all is done.
    pub(in crate::server) fn run<T: Send>(&self, mut work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
        let Some(pool) = self.pool.threads.as_ref().filter(|_| work.len() > 1) else {
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

impl Drop for FillThreads<'_> {
    fn drop(&mut self) {
        self.pool.busy.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// The number of threads of this host that are running or runnable, the calling one included.
fn running(load: &File) -> Option<usize> {
    // Held open and read from its beginning: opening it would take longer than the read.
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
        let pool = FillPool::new(None);
        let numbers = |numbers: std::ops::Range<i32>| numbers.map(|number| move || number).collect::<Vec<_>>();
        for count in 0..5 {
            let all: Vec<i32> = (0..count).collect();
            assert_eq!(pool.take_free().run(numbers(0..count)), all);
        }
        assert_eq!(pool.busy.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn this_thread_is_running() {
        assert!(running(&File::open("/proc/loadavg").unwrap()).unwrap() >= 1);
    }

    #[test]
    fn no_more_threads_are_free_than_cores_beside_this_one() {
        let pool = FillPool::new(None);
        assert!(pool.take_free().count() < pool.cores);
    }

    /// A caller that relies on a thread of another caller would wait as long as that one takes.
    #[test]
    fn a_thread_is_taken_by_one_at_a_time() {
        let pool = FillPool::new(Some(2));
        let first = pool.take_free();
        let second = pool.take_free();
        assert_eq!((first.count(), second.count()), (2, 0));
        drop(first);
        assert_eq!(pool.take_free().count(), 2);
    }
}
