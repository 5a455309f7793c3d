//! A task on a thread of its own, and what a panic of a task comes to.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tracing::error;

/// Does a part of a task that goes on whatever becomes of that part; `None` if it panics, which is logged.
///
/// For tasks that guard templates and forks: nobody else does what they do. No lock is left poisoned that is taken again as if
/// nothing had happened: all that these tasks share stays true at every moment.
pub(crate) fn survive<T>(task: &'static str, part: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(part))
        .map_err(|panic| {
            let what = panic.downcast_ref::<&str>().copied();
            let what = what.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            error!(
                event = "task_panicked",
                task,
                error = what.unwrap_or("no message"),
                "a bug of pagecast: a task left out a part of its work, and goes on"
            );
        })
        .ok()
}

/// A task that may block: the threads that the runtime has for that are for calls, and all of them may be waiting for
/// somebody just then. Dropping this ends the task where it awaits something, and waits for that.
pub(crate) struct OwnThread {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl OwnThread {
    /// Starts the task. Timers and the like are those of the runtime that this is called on.
    pub(crate) fn start(name: &str, task: impl Future<Output = ()> + Send + 'static) -> io::Result<Self> {
        let runtime = Handle::current();
        let (stop, stopped) = oneshot::channel();
        let until_stopped = async {
            tokio::select! {
                biased;
                _ = stopped => {}
                () = task => {}
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || runtime.block_on(until_stopped))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for OwnThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been told on its thread.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_a_part_and_not_the_task() {
        assert_eq!(survive("test", || 1), Some(1));
        assert_eq!(survive("test", || panic!("{}", "on purpose")), None::<i32>);
        assert_eq!(survive("test", || panic!("on purpose")), None::<i32>);
    }
}
