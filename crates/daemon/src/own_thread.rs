//! Tasks on threads of their own, and the handling of panics in tasks.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tracing::error;

/// Runs one part of a task. Logs a panic in it and returns `None`, so that the task continues.
///
/// For tasks that guard templates and forks, and must not end. Ignoring a poisoned lock afterwards is safe: the shared
/// state of these tasks is consistent at every moment.
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

/// A task that may block, on a thread of its own: API calls may occupy all blocking threads of the runtime. Dropping
/// this stops the task at its next `await`, and waits for that.
pub(crate) struct OwnThread {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl OwnThread {
    /// Starts the task. It uses the timers of the current runtime.
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
            // Its thread has logged a panic.
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
