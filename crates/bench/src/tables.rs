//! A report as tables: for a terminal, a pipe, or as Markdown.

use std::fmt::Write as _;

use comfy_table::{Cell, Color};
use pagecast_bench::goal::Verdict;
use pagecast_bench::measure::Measure;
use pagecast_bench::report::{GoalReport, Report, SectionReport};
use pagecast_bench::samples::{Row, Value};
use pagecast_command::{Column, Output};

/// The format of a report.
pub(crate) struct Tables {
    pub(crate) output: Output,
    pub(crate) markdown: bool,
}

impl Tables {
    /// Formats a section.
    pub(crate) fn section(&self, section: &SectionReport) -> String {
        let mut text = format!("\n{}\n\n", self.title(section.section.name()));
        for line in &section.about {
            let _ = writeln!(text, "{line}");
        }
        text += "\n";
        for rows in same_measures(&section.rows) {
            text += &self.rows(&rows);
            text += "\n";
        }
        for warning in &section.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        text
    }

    /// Rows with the same measures.
    fn rows(&self, rows: &[&Row]) -> String {
        let measures: Vec<Measure> = rows[0].values.keys().copied().collect();
        let has_settings = rows.iter().any(|row| !row.subject.setting.is_empty());
        let mut columns = Vec::new();
        if has_settings {
            columns.push(Column::Text(""));
        }
        columns.push(Column::Text(""));
        columns.extend(measures.iter().map(|measure| Column::Number(measure.heading())));
        let cells = rows.iter().map(|row| {
            let mut cells = Vec::new();
            if has_settings {
                cells.push(Cell::new(&row.subject.setting));
            }
            cells.push(Cell::new(row.subject.name));
            cells.extend(
                measures
                    .iter()
                    .map(|measure| Cell::new(shown(*measure, row.values.get(measure)))),
            );
            cells
        });
        self.table(&columns, cells.collect())
    }

    /// Formats the summary after the last section.
    pub(crate) fn end(&self, report: &Report) -> String {
        let columns = [
            Column::Text("goal"),
            Column::Text("relative to"),
            Column::Number("limit"),
            Column::Number("measured"),
            Column::Number("95% interval"),
            Column::Text("verdict"),
        ];
        let rows: Vec<Vec<Cell>> = report.goals().map(|(_, goal)| goal_cells(goal)).collect();
        let mut text = String::new();
        if !rows.is_empty() {
            let _ = write!(text, "\n{}\n\n", self.title("goals"));
            text += &self.table(&columns, rows);
        }
        let _ = write!(
            text,
            "\nNumbers are medians. ± is half of the interval that contains the median with 95% confidence. x is the median of \
             the ratios of paired turns to the floor.\n{}; {:.0} s\n",
            report.machine.line(),
            report.seconds
        );
        text
    }

    fn title(&self, title: &str) -> String {
        if self.markdown {
            format!("## {title}")
        } else {
            self.output.styled(&console::Style::new().bold(), title)
        }
    }

    fn table(&self, columns: &[Column], rows: Vec<Vec<Cell>>) -> String {
        if self.markdown {
            Output::markdown(columns, rows)
        } else {
            self.output.table(columns, rows)
        }
    }
}

fn goal_cells(goal: &GoalReport) -> Vec<Cell> {
    let measured = goal.measured;
    let times = if goal.to.is_some() { " x" } else { "" };
    let colour = match goal.verdict {
        Verdict::Met => Color::Green,
        Verdict::Missed => Color::Red,
        Verdict::TooNoisyToTell => Color::Yellow,
    };
    vec![
        Cell::new(&goal.what),
        Cell::new(goal.to.as_deref().unwrap_or_default()),
        Cell::new(format!("{}{times}", goal.goal)),
        Cell::new(format!("{:.2}{times}", measured.median)),
        Cell::new(format!("{:.2} to {:.2}", measured.low, measured.high)),
        Cell::new(goal.verdict).fg(colour),
    ]
}

/// Groups of rows with the same measures.
fn same_measures(rows: &[Row]) -> Vec<Vec<&Row>> {
    let mut groups: Vec<Vec<&Row>> = Vec::new();
    for row in rows {
        match groups
            .iter_mut()
            .find(|group| group[0].values.keys().eq(row.values.keys()))
        {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
}

/// The median, its interval, and the ratio.
fn shown(measure: Measure, value: Option<&Value>) -> String {
    let Some(Value { spread, ratio }) = value else {
        return String::new();
    };
    let mut text = measure.show(spread.median);
    let half = (spread.high - spread.low) / 2.0 / spread.median * 100.0;
    if spread.count > 1 && half >= 0.5 {
        if half < 99.5 {
            let _ = write!(text, " ±{half:.0}%");
        } else {
            text += " ±>99%";
        }
    }
    if let Some(ratio) = ratio.as_ref().map(|ratio| ratio.spread.median) {
        let decimals = if ratio < 9.995 { 2 } else { 0 };
        let _ = write!(text, "  {ratio:.decimals$}x");
    }
    text
}
