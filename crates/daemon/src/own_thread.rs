//! A task on a thread of its own.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

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
