//! All workers of a server, and the choice of the worker that gets a fork.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::disposal::Disposal;
use super::fill::FillPool;
use super::registry::Registry;
use super::worker::{BusyWorkers, NewFork, Worker, WorkerHandle, WorkerOptions};

/// The most workers if no number is set.
const MOST: usize = 16;

/// The workers of a server, as other threads see them.
pub(super) struct Workers {
    all: Box<[WorkerHandle]>,
    /// The first `shared` workers take more than one fork.
    shared: usize,
}

impl Workers {
    /// Starts `asked` workers, or the usual number for this machine.
    pub(super) fn start(
        asked: Option<usize>,
        registry: &Arc<Registry>,
        fill_pool: &Arc<FillPool>,
        disposal: &Arc<Disposal>,
        options: WorkerOptions,
    ) -> std::io::Result<(Self, Vec<JoinHandle<()>>)> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let (count, shared) = counts(asked, processors, options.may_be_raised);
        let busy_workers = Arc::new(BusyWorkers::new(count, processors));
        let started = (0..count).map(|index| {
            let disposal = Arc::clone(disposal);
            let busy_workers = Arc::clone(&busy_workers);
            Worker::start(
                index,
                Arc::clone(registry),
                Arc::clone(fill_pool),
                disposal,
                busy_workers,
                options,
            )
        });
        let (all, threads): (Vec<_>, Vec<_>) = started.collect::<std::io::Result<Vec<_>>>()?.into_iter().unzip();
        let workers = Self {
            shared,
            all: all.into(),
        };
        Ok((workers, threads))
    }

    /// Gives a fork to one of the workers, for life. Called by one thread only.
    pub(super) fn adopt(&self, fork: NewFork) {
        if let Some(worker) = place(&self.all, self.shared, WorkerHandle::forks) {
            worker.adopt(fork);
        }
    }

    /// Makes all workers stop once they have no fork.
    pub(super) fn stop(&self) {
        for worker in &self.all {
            worker.stop();
        }
    }
}

/// The number of workers, and how many of them take more than one fork. Usually one per processor does: a worker at
/// raised priority runs before the vCPUs that it wakes, and a second one there would only hold it up. All of them do if
/// priority cannot be raised, since a worker that waits for a processor holds up all its forks. All of them do if a
/// number is set, to spread the forks.
fn counts(asked: Option<usize>, processors: usize, may_be_raised: bool) -> (usize, usize) {
    let usual = (2 * processors).min(MOST);
    match asked {
        Some(count) => (count, count),
        None if may_be_raised => (usual, usual.min(processors)),
        None => (usual, usual),
    }
}

/// Chooses the worker that gets the next fork: one without forks, else the one with the fewest among the first
/// `shared`.
fn place<T>(workers: &[T], shared: usize, forks: impl Fn(&T) -> usize) -> Option<&T> {
    let idle = workers.iter().find(|worker| forks(worker) == 0);
    idle.or_else(|| workers.iter().take(shared).min_by_key(|worker| forks(worker)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of forks of each of `count` workers after that many have come.
    fn placed(forks: usize, count: usize, shared: usize) -> Vec<usize> {
        let workers: Vec<usize> = (0..count).collect();
        let mut have = vec![0; count];
        for _ in 0..forks {
            let worker = *place(&workers, shared, |worker| have[*worker]).unwrap();
            have[worker] += 1;
        }
        have
    }

    #[test]
    fn the_first_forks_have_a_worker_each_and_the_others_share_some() {
        assert_eq!(placed(4, 4, 2), [1, 1, 1, 1]);
        assert_eq!(placed(5, 4, 2), [2, 1, 1, 1]);
        assert_eq!(placed(20, 4, 2), [9, 9, 1, 1]);
        assert_eq!(placed(20, 4, 4), [5, 5, 5, 5]);
        assert_eq!(placed(3, 1, 1), [3]);
    }

    #[test]
    fn a_worker_that_has_lost_its_fork_gets_the_next_one() {
        let workers = [3, 4, 1, 0];
        assert_eq!(place(&workers, 2, |forks| *forks), Some(&0));
        assert_eq!(place(&workers[..3], 2, |forks| *forks), Some(&3));
    }

    #[test]
    fn one_worker_a_processor_is_shared_where_it_may_be_raised() {
        assert_eq!(counts(None, 2, true), (4, 2));
        assert_eq!(counts(None, 1, true), (2, 1));
        assert_eq!(counts(None, 64, true), (16, 16));
        assert_eq!(counts(None, 2, false), (4, 4));
    }

    #[test]
    fn as_many_as_were_asked_for_are_all_shared() {
        assert_eq!(counts(Some(1), 2, true), (1, 1));
        assert_eq!(counts(Some(8), 2, true), (8, 8));
        assert_eq!(counts(Some(32), 64, false), (32, 32));
    }
}
