//! How much of the processors the threads of a server get: their nice value (`setpriority(2)`, which on Linux is of one
//! thread: see "C library/kernel differences" there).

use rustix::process::{getpid, getpriority_process, setpriority_process};

/// What a worker is raised by.
const RAISE: i32 = 10;

/// What work in the background leaves to everybody else: all of it, where they want it.
const BACKGROUND: i32 = 19;

/// Over how many wakes it is counted how many things wait for a worker at a time.
const WAKES: usize = 64;

/// What is counted in: so many are one thing.
const THING: usize = 1024;

/// A worker is raised where so many things wait for it at a time, and is as it was where fewer than that do.
const RAISED_FROM: usize = 3 * THING;
const LOWERED_BELOW: usize = 5 * THING / 2;

/// The priority of this thread from now on: that of work for which nobody waits.
pub(crate) fn lower() {
    // To work with more weight than is due does no harm.
    let _ = setpriority_process(None, BACKGROUND);
}

/// The priority of this thread from now on: that of the process, whoever has made the thread.
pub(crate) fn reset() {
    let _ = setpriority_process(None, of_process());
}

/// Whether threads of this process may be raised (`CAP_SYS_NICE`, or `RLIMIT_NICE`).
pub(crate) fn may_be_raised() -> bool {
    let tried = std::thread::Builder::new().spawn(|| setpriority_process(None, of_process() - RAISE).is_ok());
    // Where there is no thread to be had to try it on, none is raised.
    tried.is_ok_and(|tried| tried.join().unwrap_or(false))
}

fn of_process() -> i32 {
    getpriority_process(Some(getpid())).unwrap_or(0)
}

/// The priority of a worker, raised while many things wait for it at a time.
///
/// A worker that many forks wait for is to be run before the vCPUs that it wakes, or each of them takes its core in turn,
/// and the others wait. Where few forks wait it is the other way round: the sooner their vCPUs run, the better.
#[derive(Debug)]
pub(crate) struct WorkerPriority {
    usual: i32,
    may_be_raised: bool,
    is_raised: bool,
    /// What it was woken for lately, on average, in parts of a [`THING`].
    mean: usize,
}

impl WorkerPriority {
    /// Of this thread, which is a worker.
    pub(crate) fn new(may_be_raised: bool) -> Self {
        Self {
            usual: of_process(),
            may_be_raised,
            is_raised: false,
            mean: THING,
        }
    }

    /// It was woken for so many things.
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
        // A wake for one thing is no reason yet.
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
