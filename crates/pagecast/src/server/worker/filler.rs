//! The second thread of a worker, which fills forks while the worker serves others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use super::context::WorkerContext;
use super::message::{Message, Slot};
use crate::server::served_fork::FillStep;

/// A step of filling a fork, and what ends it early.
pub(super) struct Job {
    pub(super) slot: Slot,
    pub(super) step: FillStep,
    pub(super) interrupt: Arc<AtomicBool>,
}

/// Carries out steps of filling, one at a time.
///
/// When a VMM dies while memory is installed into it, its address space is torn down by the installing thread: that takes up to a
/// second and more for some GiB, in the middle of an `ioctl`. On this thread nobody waits for that but other fills.
pub(super) struct Filler {
    jobs: mpsc::Sender<Job>,
}

impl Filler {
    /// Starts the thread. `None` if there can be none.
    pub(super) fn start(index: usize, context: Arc<WorkerContext>) -> Option<Self> {
        let (jobs, received) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name(format!("pagecast-{index}-fill"));
        let spawned = thread.spawn(move || {
            // The worker has made this thread, and may be raised.
            crate::priority::reset();
            for Job { slot, step, interrupt } in received {
                let threads = context.fill_pool.take_free();
                let filled = step.carry_out(&threads, &context.zeros, || interrupt.load(Ordering::Relaxed));
                drop(threads);
                context.inbox.send(Message::Filled { slot, filled });
            }
        });
        spawned.ok().map(|_| Self { jobs })
    }

    /// Hands a step over; gives it back if the thread is gone.
    pub(super) fn fill(&self, job: Job) -> Result<(), Job> {
        self.jobs.send(job).map_err(|refused| refused.0)
    }
}
