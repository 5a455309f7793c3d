//! The second thread of a worker, which fills forks while the worker serves others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use super::context::WorkerContext;
use super::message::{Message, Slot};
use crate::server::fill::FillStep;

/// A step of filling a fork, and the flag that ends it early.
pub(super) struct Job {
    pub(super) slot: Slot,
    pub(super) step: FillStep,
    pub(super) interrupt: Arc<AtomicBool>,
}

/// Carries out steps of filling, one at a time.
///
/// If a VMM dies while memory is installed into it, the installing thread tears down its address space, in the middle
/// of an `ioctl`. For some GiB that takes a second or more. On this thread, only other fills wait for that.
pub(super) struct Filler {
    jobs: mpsc::Sender<Job>,
}

impl Filler {
    /// Starts the thread. `None` if that fails.
    pub(super) fn start(index: usize, context: Arc<WorkerContext>) -> Option<Self> {
        let (jobs, received) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name(format!("pagecast-{index}-fill"));
        let spawned = thread.spawn(move || {
            // The worker starts this thread, and may run at raised priority.
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

    /// Hands a step over. Returns it if the thread is gone.
    pub(super) fn fill(&self, job: Job) -> Result<(), Job> {
        self.jobs.send(job).map_err(|refused| refused.0)
    }
}
