//! How far a run is, on stderr where that is a terminal.

use std::io::Write as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for one part of a run. It vanishes when it is dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Begins something that is over once `length` forks have done it.
    pub(crate) fn start(what: &'static str, length: usize) -> Self {
        let style =
            ProgressStyle::with_template("{spinner:.cyan} {msg} {wide_bar:.cyan/dim} {pos}/{len} {elapsed:.dim}")
                .expect("the template is well-formed");
        // Hidden where stderr is no terminal.
        let bar = ProgressBar::new(length as u64).with_style(style).with_message(what);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar }
    }

    /// So many forks have done it.
    pub(crate) fn set(&self, done: usize) {
        self.bar.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Says it on stderr, on a line of its own. That nobody reads it is no reason to stop.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "pagecast: {line}");
}
