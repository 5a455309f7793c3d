//! Progress on stderr: bars on a terminal, else lines.

use std::time::Instant;

use console::{StyledObject, style, user_attended_stderr};
use pagecast_command::progress::{self, Unit};
use pagecast_command::stderr;

/// Writes a line on standard error.
pub fn say(line: &str) {
    stderr::write_line(format!("{line}\n").as_bytes());
}

/// A step that takes time. If it is dropped before its end, only its bar vanishes.
#[derive(Debug)]
pub struct Progress {
    bar: progress::Progress,
    what: String,
    started: Instant,
}

impl Progress {
    /// Starts a step of unknown length.
    pub fn start(what: &str) -> Self {
        Self::with_bar(what, progress::Progress::spinner(what.to_owned()))
    }

    /// Starts a step that ends after `count` of `unit`, a name in the plural.
    pub fn of(what: &str, unit: &'static str, count: u64) -> Self {
        Self::with_bar(
            what,
            progress::Progress::bar(what.to_owned(), count, Unit::Things(unit)),
        )
    }

    fn with_bar(what: &str, bar: progress::Progress) -> Self {
        if !user_attended_stderr() {
            say(&format!("{what} ..."));
        }
        Self {
            bar,
            what: what.to_owned(),
            started: Instant::now(),
        }
    }

    /// Adds to the progress.
    pub fn advance(&self, count: u64) {
        self.bar.advance(count);
    }

    /// Ends the step with this result.
    pub fn done(self, outcome: &str) {
        self.end(style("ok").green(), outcome);
    }

    /// Ends the step with this result, which is wrong.
    pub fn failed(self, outcome: &str) {
        self.end(style("FAILED").red().bold(), outcome);
    }

    fn end(self, verdict: StyledObject<&str>, outcome: &str) {
        drop(self.bar);
        let seconds = format!("{:.1} s", self.started.elapsed().as_secs_f64());
        let seconds = style(seconds).dim().for_stderr();
        say(&format!("{} {}: {outcome} {seconds}", verdict.for_stderr(), self.what));
    }
}
