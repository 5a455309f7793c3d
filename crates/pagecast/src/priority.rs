//! Nice values of the server's threads (`setpriority(2)`, which on Linux is of one thread: see "C library/kernel
//! differences" there).

use rustix::process::{getpid, getpriority_process, setpriority_process};

/// Amount by which the nice value of a raised worker is lowered.
const RAISE: i32 = 10;

/// The nice value of background work, which yields to all other threads.
const BACKGROUND: i32 = 19;

/// Number of wakes over which the events per wake are averaged.
const WAKES: usize = 64;

/// The unit of the average: one event.
const THING: usize = 1024;

/// A worker is raised once its average reaches the first, and lowered once it is below the second.
const RAISED_FROM: usize = 3 * THING;
const LOWERED_BELOW: usize = 5 * THING / 2;

/// Gives this thread the priority of background work.
pub(crate) fn lower() {
    // Background work with too much priority does no harm.
    let _ = setpriority_process(None, BACKGROUND);
}

/// Gives this thread the priority of the process, whichever thread started it.
pub(crate) fn reset() {
    let _ = setpriority_process(None, of_process());
}

/// Returns `true` if threads of this process may be raised (`CAP_SYS_NICE`, or `RLIMIT_NICE`).
pub(crate) fn may_be_raised() -> bool {
    let tried = std::thread::Builder::new().spawn(|| setpriority_process(None, of_process() - RAISE).is_ok());
    // No thread can be started to try it on: none is raised.
    tried.is_ok_and(|tried| tried.join().unwrap_or(false))
}

fn of_process() -> i32 {
    getpriority_process(Some(getpid())).unwrap_or(0)
}

/// The priority of a worker, raised while many events wait for it.
///
/// A worker with many waiting forks must run before the vCPUs that it wakes: otherwise each takes its core in turn, and
/// the other forks wait. With few waiting forks the opposite holds: the sooner their vCPUs run, the better.
#[derive(Debug)]
pub(crate) struct WorkerPriority {
    usual: i32,
    may_be_raised: bool,
    is_raised: bool,
    /// Average number of events at recent wakes, in parts of a [`THING`].
    mean: usize,
}

impl WorkerPriority {
    /// Creates the priority of this thread, which is a worker.
    pub(crate) fn new(may_be_raised: bool) -> Self {
        Self {
            usual: of_process(),
            may_be_raised,
            is_raised: false,
            mean: THING,
        }
    }

    /// Records a wake with this number of events.
    pub(crate) fn woken_for(&mut self, things: usize) {
        self.mean = self.mean - self.mean / WAKES + things * THING / WAKES;
        let raise = self.mean >= if self.is_raised { LOWERED_BELOW } else { RAISED_FROM };
        if raise != self.is_raised && self.may_be_raised {
            self.is_raised = raise;
            let _ = setpriority_process(None, if raise { self.usual - RAISE } else { self.usual });
        }
    }
}

#[cfg(test)]
mod tests {
    use pagecast_testkit::skip::{Need, skip};
    use rustix::thread::CapabilitySet;

    use super::*;

    fn of_this_thread() -> i32 {
        getpriority_process(None).unwrap()
    }

    #[test]
    fn a_worker_is_raised_while_many_things_wait_for_it() {
        let usual = of_this_thread();
        let may_be_raised = may_be_raised();
        let raised = if may_be_raised { usual - RAISE } else { usual };
        let mut priority = WorkerPriority::new(may_be_raised);
        for _ in 0..1000 {
            priority.woken_for(2);
            assert_eq!(of_this_thread(), usual);
        }
        for _ in 0..5 * WAKES {
            priority.woken_for(4);
        }
        assert_eq!(of_this_thread(), raised);
        // A wake for one event is not enough.
        priority.woken_for(1);
        assert_eq!(of_this_thread(), raised);
        for _ in 0..5 * WAKES {
            priority.woken_for(2);
        }
        assert_eq!(of_this_thread(), usual);
        assert_eq!(
            getpriority_process(Some(getpid())).unwrap(),
            usual,
            "of this thread alone"
        );
        if !may_be_raised {
            skip((
                Need::Capabilities(CapabilitySet::SYS_NICE),
                "to raise the priority of a thread",
            ));
        }
    }

    #[test]
    fn what_a_thread_inherits_is_undone() {
        lower();
        assert_eq!(of_this_thread(), BACKGROUND);
        if may_be_raised() {
            reset();
            assert_eq!(of_this_thread(), of_process());
        }
    }
}
