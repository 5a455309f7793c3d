//! The result of a run, for people.

use std::fmt::Write as _;

use comfy_table::{Cell, Color};
use indicatif::BinaryBytes;
use pagecast_client::fork::ForkMemory;

use super::report::{ForkReport, Report, Spread, State};
use pagecast_command::{Column, Output, harmless};

const COLUMNS: [Column; 9] = [
    Column::Text("fork"),
    Column::Text("state"),
    Column::Text("backend"),
    Column::Number("load ms"),
    Column::Number("resume ms"),
    Column::Number("pid"),
    Column::Number("rss"),
    Column::Number("pss"),
    Column::Number("private"),
];

/// A row for each fork, the errors, and the summary.
pub(crate) fn for_people(report: &Report, output: Output) -> String {
    let mut text = output.table(&COLUMNS, report.forks.iter().map(row).collect());
    for fork in &report.forks {
        if let Some(error) = &fork.error {
            let _ = writeln!(text, "{}: {error}", fork.id);
        }
    }
    text + &summary(report)
}

fn row(fork: &ForkReport) -> Vec<Cell> {
    let colour = match fork.state {
        State::Resumed => Color::Green,
        State::Exited | State::Starting | State::Started | State::Loaded => Color::Yellow,
        State::Died | State::Failed => Color::Red,
    };
    let ms = |value: Option<f64>| value.map_or_else(dash, |value| format!("{value:.1}"));
    let bytes = |of: fn(&ForkMemory) -> u64| {
        let memory = fork.memory.as_ref().map(of);
        memory.map_or_else(dash, |bytes| BinaryBytes(bytes).to_string())
    };
    vec![
        Cell::new(&fork.id),
        Cell::new(fork.state).fg(colour),
        Cell::new(fork.backend.map_or_else(dash, |backend| backend.to_string())),
        Cell::new(ms(fork.load_ms)),
        Cell::new(ms(fork.resume_ms)),
        Cell::new(fork.pid.map_or_else(dash, |pid| pid.to_string())),
        Cell::new(bytes(|memory| memory.rss)),
        Cell::new(bytes(|memory| memory.pss)),
        Cell::new(bytes(|memory| memory.private)),
    ]
}

/// A value that is not known.
fn dash() -> String {
    "-".to_owned()
}

fn summary(report: &Report) -> String {
    let summary = &report.summary;
    let mut text = format!(
        "resumed {} of {} from {} in {:.1} ms",
        summary.resumed, summary.forks, report.template, summary.all_ms
    );
    let spread = |Spread { median, max }| format!("median {median:.1} ms, max {max:.1} ms");
    if let (Some(load), Some(resume)) = (summary.load_ms, summary.resume_ms) {
        let _ = write!(text, "; load: {}; resume: {}", spread(load), spread(resume));
    }
    text.push('\n');
    if let Some(memory) = summary.memory {
        let _ = writeln!(
            text,
            "memory: {} PSS, {} of it private; without sharing it would be {} ({} of {} measured)",
            BinaryBytes(memory.pss),
            BinaryBytes(memory.private),
            BinaryBytes(memory.unshared),
            memory.measured,
            summary.forks
        );
    }
    for ((backend, reason), forks) in report.reasons() {
        let _ = writeln!(text, "backend {backend} ({forks}): {}", harmless(reason));
    }
    text
}
