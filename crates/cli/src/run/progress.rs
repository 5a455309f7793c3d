//! How far a run is, on stderr. Nothing here blocks: the callers also handle signals and end the Firecrackers.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pagecast_command::stderr;

/// Time between two drawings.
const PACE: Duration = Duration::from_millis(100);

/// Time that a terminal has to take the last drawing.
const PATIENCE: Duration = Duration::from_millis(200);

/// A bar or spinner for one part of a run, drawn by a thread of its own, since a stopped terminal (Ctrl-S) blocks the drawing
/// thread. It vanishes when it is dropped.
pub(crate) struct Progress {
    done: Arc<AtomicUsize>,
    /// Stops the thread when it is dropped.
    stop: Option<Sender<()>>,
    stopped: Receiver<()>,
}

impl Progress {
    /// Begins something that is over once `length` forks have done it.
    pub(crate) fn bar(what: &'static str, length: usize) -> Self {
        Self::draw(move || {
            let style =
                ProgressStyle::with_template("{spinner:.cyan} {msg} {wide_bar:.cyan/dim} {pos}/{len} {elapsed:.dim}")
                    .expect("the template is well-formed");
            ProgressBar::new(length as u64).with_style(style).with_message(what)
        })
    }

    /// Begins something whose length is not known.
    pub(crate) fn spinner(what: impl Into<Cow<'static, str>> + Send + 'static) -> Self {
        Self::draw(move || ProgressBar::new_spinner().with_message(what))
    }

    /// Nothing is drawn if there is no thread for it.
    fn draw(make: impl FnOnce() -> ProgressBar + Send + 'static) -> Self {
        let done = Arc::<AtomicUsize>::default();
        let ((stop, is_stopped), (has_stopped, stopped)) = (channel::<()>(), channel());
        let drawn = Arc::clone(&done);
        let _ = std::thread::Builder::new().name("progress".to_owned()).spawn(move || {
            // Hidden where stderr is no terminal.
            let bar = make();
            while !bar.is_hidden() && is_stopped.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
                bar.set_position(drawn.load(Ordering::Relaxed) as u64);
                bar.tick();
            }
            bar.finish_and_clear();
            let _ = has_stopped.send(());
        });
        Self {
            done,
            stop: Some(stop),
            stopped,
        }
    }

    /// So many forks have done it.
    pub(crate) fn set(&self, done: usize) {
        self.done.store(done, Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.stopped.recv_timeout(PATIENCE);
    }
}

/// Begins to write lines through [`stderr`], panics included.
pub(crate) fn start_saying() {
    stderr::start(|lines| {
        format!("pagecast: lines that nobody has read in time, and that were dropped: {lines}\n").into_bytes()
    });
    std::panic::set_hook(Box::new(|panic| say(&stderr::describe_panic(panic))));
}

/// Prints the text on stderr, on a line of its own.
pub(crate) fn say(line: &str) {
    stderr::write_line(format!("pagecast: {line}\n").as_bytes());
}
