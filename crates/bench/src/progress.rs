//! What happens, on stderr: bars on a terminal, lines elsewhere.

use std::time::{Duration, Instant};

use console::{StyledObject, style};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use pagecast_command::stderr;

/// Says it on a line of its own. That nobody reads stderr any more is no reason to stop.
pub fn say(line: &str) {
    stderr::write_line(format!("{line}\n").as_bytes());
}

/// Something that takes its time. If it is dropped before it is done, only its bar vanishes.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    what: String,
    started: Instant,
}

impl Progress {
    /// Begins something that nobody knows the end of.
    pub fn start(what: &str) -> Self {
        Self::with_bar(what, ProgressBar::new_spinner(), "{spinner:.cyan} {msg} {elapsed:.dim}")
    }

    /// Begins something that is over after so many of a unit.
    pub fn of(what: &str, unit: &str, count: u64) -> Self {
        let template =
            format!("{{spinner:.cyan}} {{msg}} {{wide_bar:.cyan/dim}} {{pos}}/{{len}} {unit} {{elapsed:.dim}}");
        Self::with_bar(what, ProgressBar::new(count), &template)
    }

    fn with_bar(what: &str, bar: ProgressBar, template: &str) -> Self {
        let style = ProgressStyle::with_template(template).expect("the templates here are well-formed");
        let bar = bar
            .with_style(style)
            .with_message(what.to_owned())
            .with_finish(ProgressFinish::AndClear);
        if bar.is_hidden() {
            say(&format!("{what} ..."));
        } else {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self {
            bar,
            what: what.to_owned(),
            started: Instant::now(),
        }
    }

    /// So many more are done.
    pub fn advance(&self, count: u64) {
        self.bar.inc(count);
    }

    /// It is over, and this came of it.
    pub fn done(self, outcome: &str) {
        self.end(style("ok").green(), outcome);
    }

    /// It is over, and this came of it, which should not be.
    pub fn failed(self, outcome: &str) {
        self.end(style("FAILED").red().bold(), outcome);
    }

    fn end(self, verdict: StyledObject<&str>, outcome: &str) {
        self.bar.finish_and_clear();
        let seconds = format!("{:.1} s", self.started.elapsed().as_secs_f64());
        let seconds = style(seconds).dim().for_stderr();
        say(&format!("{} {}: {outcome} {seconds}", verdict.for_stderr(), self.what));
    }
}
