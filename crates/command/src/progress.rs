//! Progress on standard error: a bar or a spinner on a terminal, else nothing.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two drawings.
const PACE: Duration = Duration::from_millis(100);

/// Time that a terminal gets for the last drawing.
const PATIENCE: Duration = Duration::from_millis(200);

/// A bar or spinner. Dropping it clears it.
///
/// A thread draws it: a stopped terminal (Ctrl-S) blocks the drawing thread, and the caller may have signals to handle
/// and processes to end.
#[derive(Debug)]
pub struct Progress {
    done: Arc<AtomicU64>,
    /// Stops the thread when it is dropped.
    stop: Option<Sender<()>>,
    /// Sent once, when the thread has stopped. In a mutex, since threads share the bar that they advance.
    stopped: Mutex<Receiver<()>>,
}

/// The unit of a bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things with this name, in the plural.
    Things(&'static str),
    /// Bytes, shown in KiB, MiB and so on.
    Bytes,
}

impl Progress {
    /// Starts a bar for a step that ends at `length` of `unit`.
    pub fn bar(what: impl Into<Cow<'static, str>> + Send + 'static, length: u64, unit: Unit) -> Self {
        Self::draw(move || {
            let counts = match unit {
                Unit::Things(name) => format!("{{pos}}/{{len}} {name}"),
                Unit::Bytes => "{binary_bytes}/{binary_total_bytes}".to_owned(),
            };
            let template = format!("{{spinner:.cyan}} {{msg}} {{wide_bar:.cyan/dim}} {counts} {{elapsed:.dim}}");
            ProgressBar::new(length).with_style(style(&template)).with_message(what)
        })
    }

    /// Starts a spinner for a step of unknown length.
    pub fn spinner(what: impl Into<Cow<'static, str>> + Send + 'static) -> Self {
        Self::draw(move || {
            let style = style("{spinner:.cyan} {msg} {elapsed:.dim}");
            ProgressBar::new_spinner().with_style(style).with_message(what)
        })
    }

    /// Draws nothing if no thread can be started.
    fn draw(make: impl FnOnce() -> ProgressBar + Send + 'static) -> Self {
        let done = Arc::<AtomicU64>::default();
        let ((stop, is_stopped), (has_stopped, stopped)) = (channel::<()>(), channel());
        let drawn = Arc::clone(&done);
        let _ = std::thread::Builder::new().name("progress".to_owned()).spawn(move || {
            // Hidden if standard error is no terminal.
            let bar = make();
            while !bar.is_hidden() && is_stopped.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
                bar.set_position(drawn.load(Ordering::Relaxed));
                bar.tick();
            }
            bar.finish_and_clear();
            let _ = has_stopped.send(());
        });
        Self {
            done,
            stop: Some(stop),
            stopped: Mutex::new(stopped),
        }
    }

    /// Sets the progress, in units of the bar.
    pub fn set(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
    }

    /// Adds to the progress, in units of the bar.
    pub fn advance(&self, by: u64) {
        self.done.fetch_add(by, Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        let stopped = self.stopped.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = stopped.recv_timeout(PATIENCE);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is well-formed")
}
