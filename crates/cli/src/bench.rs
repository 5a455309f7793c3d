//! `pagecast bench`: what pagecast costs on this machine, beside floors and rivals.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use comfy_table::{Cell, Color};
use pagecast_bench::goal::Verdict;
use pagecast_bench::interrupt::Interrupt;
use pagecast_bench::measure::Measure;
use pagecast_bench::report::{GoalReport, Report, SectionReport};
use pagecast_bench::samples::{Row, Value};
use pagecast_bench::section::{Scale, Section};
use pagecast_bench::{Bench, plots};

use crate::output::{Column, Output};

/// This very program, also where its file has been replaced since it was started.
const OURSELVES: &str = "/proc/self/exe";
/// Where JSON goes if no file is named.
const STDOUT: &str = "-";

/// Measure what pagecast costs on this machine, beside the least that it could cost and beside others
///
/// Each number stands beside a floor, the smallest program that does the same job, and beside what others do. Who is
/// compared takes turns, so that what disturbs the one disturbs the other; ratios are those of paired turns. Floors,
/// rivals and what was done are named with the numbers.
///
/// Real Firecrackers are measured where there is /dev/kvm and the source tree that this was built from (Firecracker itself
/// is found by `PAGECAST_FIRECRACKER`, on PATH, or fetched), simulated VMMs elsewhere. Everything it starts it ends, and
/// it leaves no files behind but those that were asked for.
///
/// The exit code is 0 also where a goal is missed, unless --check asks for 4; 1 if something failed, 128 and the signal
/// if interrupted.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub(crate) struct BenchArgs {
    /// Measure less: all of it in under a minute
    #[arg(long)]
    quick: bool,

    /// As little as shows that all of it works
    #[arg(long, hide = true, conflicts_with = "quick")]
    tiny: bool,

    /// Measure only this
    #[arg(long, value_enum, value_name = "SECTION", num_args = 1.., value_delimiter = ',')]
    only: Vec<Section>,

    /// Write all that was measured as JSON: into a file, or to stdout and nothing else there
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = STDOUT)]
    json: Option<PathBuf>,

    /// Draw what was measured, as SVG and PNG files in this folder
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,

    /// Print tables as Markdown
    #[arg(long)]
    markdown: bool,

    /// Exit with 4 where a goal is missed
    #[arg(long)]
    check: bool,
}

/// The exit code where a goal is missed and somebody wants to know.
const MISSED: u8 = 4;

impl BenchArgs {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let interrupt = Interrupt::watch()?;
        let outcome = self.measure(&interrupt);
        if let Some(signal) = interrupt.signal() {
            pagecast_bench::progress::say(
                "pagecast: interrupted; every process was ended, every temporary file removed",
            );
            return Ok(u8::try_from(128 + signal).map_or(ExitCode::FAILURE, ExitCode::from));
        }
        let report = outcome?;
        let missed = report.goals().any(|(_, goal)| goal.verdict == Verdict::Missed);
        Ok(if self.check && missed {
            ExitCode::from(MISSED)
        } else {
            ExitCode::SUCCESS
        })
    }

    fn measure(&self, interrupt: &Interrupt) -> Result<Report> {
        ensure!(
            !cfg!(debug_assertions) || self.tiny,
            "this pagecast was built without optimisation: its numbers would mean nothing (use `cargo xtask bench`, or build \
             with --release)"
        );
        // What cannot be written is better known before the minutes have passed.
        for folder in [self.plots.as_deref(), self.json.as_deref().and_then(Path::parent)] {
            let Some(folder) = folder.filter(|folder| !folder.as_os_str().is_empty()) else {
                continue;
            };
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let tables = Tables {
            output: Output::stdout(),
            markdown: self.markdown,
        };
        let only: BTreeSet<Section> = self.only.iter().copied().collect();
        let bench = Bench {
            sections: if only.is_empty() {
                Section::ALL.to_vec()
            } else {
                only.into_iter().collect()
            },
            scale: match (self.tiny, self.quick) {
                (true, _) => Scale::Tiny,
                (_, true) => Scale::Quick,
                _ => Scale::Full,
            },
            pagecast: OURSELVES.into(),
        };
        let json_only = self.json.as_deref() == Some(Path::new(STDOUT));
        if self.markdown && !json_only {
            tables.output.print("# pagecast bench\n")?;
        }
        let report = pagecast_bench::run(&bench, interrupt, |section| {
            if json_only {
                Ok(())
            } else {
                tables.output.print(&tables.section(section))
            }
        })?;
        if json_only {
            tables.output.print_json(&report)?;
        } else {
            tables.output.print(&tables.end(&report))?;
        }
        if let Some(path) = self.json.as_deref().filter(|_| !json_only) {
            let json = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
            fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
        if let Some(folder) = &self.plots {
            plots::draw(&report, folder)?;
        }
        Ok(report)
    }
}

/// How a report looks.
struct Tables {
    output: Output,
    markdown: bool,
}

impl Tables {
    fn section(&self, section: &SectionReport) -> String {
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

    /// Rows that were measured in the same way.
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

    /// What is said once all has been measured.
    fn end(&self, report: &Report) -> String {
        let columns = [
            Column::Text("goal"),
            Column::Text("beside"),
            Column::Number("is to be"),
            Column::Number("is"),
            Column::Number("95% interval"),
            Column::Text(""),
        ];
        let rows: Vec<Vec<Cell>> = report.goals().map(|(_, goal)| goal_cells(goal)).collect();
        let mut text = String::new();
        if !rows.is_empty() {
            let _ = write!(text, "\n{}\n\n", self.title("goals"));
            text += &self.table(&columns, rows);
        }
        let _ = write!(
            text,
            "\nNumbers are medians, ± is half of the interval that has the median with 95% confidence, x the median of the \
             ratios of paired turns to the floor.\n{}; {:.0} s\n",
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

/// Rows with the same measures, together.
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

/// The median, how sure it is, and the ratio.
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
