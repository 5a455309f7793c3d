//! The pictures of a report.

use super::bars::{Axis, Bar, Bars, ROW};
use super::lines::{self, Line, Lines};
use super::picture::{
    Anchor, FAINT_TEXT, FLOOR, GOAL, GRID, Ink, MET, OURS, OURS_AHEAD, OURS_FILE, Picture, RIVAL, TEXT, UNKNOWN, at,
};
use super::render::width;
use crate::goal::{Goal, Verdict};
use crate::measure::Measure;
use crate::report::{GoalReport, Report, SectionReport};
use crate::samples::Row;
use crate::section::Section;
use crate::sections::{faults, growth, ready, zeros};

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 28.0;
const HEAD: f64 = 64.0;
const FOOT: f64 = 30.0;

/// Returns the pictures that have data, with their names.
pub(super) fn all(report: &Report) -> Vec<(&'static str, Picture)> {
    let of_section = |section: Section, draw: fn(&SectionReport) -> Option<Figure>| {
        let figure = draw(report.section(section)?)?;
        Some((section.name(), figure.picture(report)))
    };
    [
        of_section(Section::Faults, faults_figure),
        of_section(Section::Ready, ready_figure),
        of_section(Section::Prefault, prefault_figure),
        of_section(Section::Zeros, zeros_figure),
        of_section(Section::Fanout, fanout_figure),
        of_section(Section::Growth, growth_figure),
        goals_picture(report).map(|picture| ("goals", picture)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A title, panels beside or below each other, and a footer.
struct Figure {
    title: &'static str,
    subtitle: String,
    panels: Vec<Panel>,
    /// Whether panels are beside each other.
    beside: bool,
}

enum Panel {
    Bars(Bars),
    Lines(Lines),
}

impl Panel {
    fn height(&self) -> f64 {
        match self {
            Self::Bars(bars) => bars.height(),
            Self::Lines(_) => lines::HEIGHT,
        }
    }
}

impl Figure {
    fn picture(self, report: &Report) -> Picture {
        let heights: Vec<f64> = self.panels.iter().map(Panel::height).collect();
        let body = if self.beside {
            heights.iter().copied().fold(0.0, f64::max)
        } else {
            heights.iter().sum()
        };
        let mut picture = framed(self.title, &self.subtitle, report, body);
        let inner = WIDTH - 2.0 * MARGIN;
        let count = f64::from(u32::try_from(self.panels.len()).unwrap_or(1));
        let panel_width = if self.beside {
            (inner - 30.0 * (count - 1.0)) / count
        } else {
            inner
        };
        let mut corner = at(MARGIN, HEAD);
        for (panel, height) in self.panels.iter().zip(heights) {
            match panel {
                Panel::Bars(bars) => bars.draw(&mut picture, corner, panel_width),
                Panel::Lines(lines) => lines.draw(&mut picture, corner, panel_width),
            }
            if self.beside {
                corner.x += panel_width + 30.0;
            } else {
                corner.y += height;
            }
        }
        picture
    }
}

/// Creates a picture with title and footer, and space of this height between them.
fn framed(title: &str, subtitle: &str, report: &Report, body: f64) -> Picture {
    let mut picture = Picture::new(WIDTH, HEAD + body + FOOT + 6.0);
    picture.bold(at(MARGIN, 24.0), title, TEXT, 17.0, Anchor::Start);
    picture.text(at(MARGIN, 46.0), subtitle, FAINT_TEXT, 12.0, Anchor::Start);
    let foot = picture.height - 16.0;
    picture.text(
        at(MARGIN, foot),
        format!("pagecast-bench, {}", report.machine.line()),
        FAINT_TEXT,
        10.5,
        Anchor::Start,
    );
    picture
}

fn ink(name: &str) -> Ink {
    match name {
        _ if name.starts_with("floor") => FLOOR,
        _ if name.starts_with("rival") => RIVAL,
        _ if name.starts_with("file") => OURS_FILE,
        _ if name.contains("prefault") => OURS_AHEAD,
        _ => OURS,
    }
}

/// The part of a row that is drawn as a bar.
fn bar(row: &Row, measure: Measure, group: &str, unit: &str) -> Option<Bar> {
    let value = row.values.get(&measure)?;
    let ratio = value.ratio.as_ref().map(|ratio| ratio.spread.median);
    let ratio = ratio
        .map(|ratio| format!("  ({} x)", short_ratio(ratio)))
        .unwrap_or_default();
    Some(Bar {
        group: group.to_owned(),
        label: row.subject.name.to_owned(),
        value: value.spread.median,
        between: (value.spread.low, value.spread.high),
        ink: ink(row.subject.name),
        note: format!("{} {unit}{ratio}", measure.show(value.spread.median)),
        goal: None,
    })
}

fn short_ratio(ratio: f64) -> String {
    if ratio < 9.95 {
        format!("{ratio:.2}")
    } else {
        format!("{ratio:.0}")
    }
}

/// Creates a panel of one measure, with all rows that have it.
fn panel(section: &SectionReport, title: &str, measure: Measure, unit: &str, axis: Axis) -> Option<Panel> {
    let rows: Vec<Bar> = section
        .rows
        .iter()
        .filter_map(|row| bar(row, measure, &row.subject.setting, unit))
        .collect();
    (!rows.is_empty()).then(|| {
        Panel::Bars(Bars {
            title: title.to_owned(),
            axis,
            rows,
        })
    })
}

/// Marks the goal of a row, as a multiple of another row.
fn mark(panel: &mut Panel, group: &str, label: &str, times: f64, other: &str) {
    let Panel::Bars(bars) = panel else { return };
    let of = |label: &str| {
        bars.rows
            .iter()
            .position(|bar| bar.group == group && bar.label == label)
    };
    if let (Some(this), Some(other)) = (of(label), of(other)) {
        bars.rows[this].goal = Some(bars.rows[other].value * times);
    }
}

fn faults_figure(section: &SectionReport) -> Option<Figure> {
    let mut p50 = panel(
        section,
        "Time of a fault, median, us",
        Measure::FaultP50Us,
        "us",
        Axis::Linear,
    )?;
    mark(&mut p50, faults::ONE_CPU, faults::PAGECAST, 1.15, faults::FLOOR);
    let p99 = panel(
        section,
        "Time of a fault, 99th percentile, us",
        Measure::FaultP99Us,
        "us",
        Axis::Linear,
    )?;
    let mut rate = panel(section, "Faults a second", Measure::FaultsPerSecond, "/s", Axis::Linear)?;
    mark(&mut rate, faults::MANY, faults::PAGECAST, 1.1, faults::FLOOR);
    Some(Figure {
        title: "Page faults on demand",
        subtitle:
            "Medians with their 95% intervals. Red: the goal. In brackets: the ratio of paired turns to the floor."
                .to_owned(),
        panels: vec![p50, p99, rate],
        beside: false,
    })
}

fn ready_figure(section: &SectionReport) -> Option<Figure> {
    let mut time = panel(
        section,
        "Time until the working set has been read, ms (logarithmic)",
        Measure::ReadyMs,
        "ms",
        Axis::Logarithmic,
    )?;
    mark(&mut time, ready::WARM, ready::FILE, 1.1, ready::PLAIN);
    mark(&mut time, ready::WARM, ready::PREFAULT, 0.25, ready::ON_DEMAND);
    let memory = panel(
        section,
        "Memory copied into the fork, MiB (with file, pages that are only read are shared)",
        Measure::InstalledMib,
        "MiB",
        Axis::Linear,
    )?;
    Some(Figure {
        title: "Time to a working set that has been read",
        subtitle: first_sentence(section),
        panels: vec![time, memory],
        beside: false,
    })
}

/// Returns the first sentence of its method, for a subtitle.
fn first_sentence(section: &SectionReport) -> String {
    let about = section.about.first().map_or("", String::as_str);
    about.split_once(". ").map_or(about, |(first, _)| first).to_owned()
}

fn prefault_figure(section: &SectionReport) -> Option<Figure> {
    Some(Figure {
        title: "Prefault of all memory",
        subtitle: "A whole template of data, from before the VMM connects until the last page is installed.".to_owned(),
        panels: vec![panel(
            section,
            "GiB a second",
            Measure::GibPerSecond,
            "GiB/s",
            Axis::Linear,
        )?],
        beside: false,
    })
}

fn zeros_figure(section: &SectionReport) -> Option<Figure> {
    let mut panel = panel(
        section,
        "Time to touch a page that is zeros in the template, ns (logarithmic)",
        Measure::NanosPerPage,
        "ns",
        Axis::Logarithmic,
    )?;
    mark(&mut panel, zeros::WRITTEN, zeros::UFFD, 1.3, zeros::ANONYMOUS);
    Some(Figure {
        title: "Fresh memory",
        subtitle: "Zeros given back to the kernel, beside memory without a page server. Red: the goal.".to_owned(),
        panels: vec![panel],
        beside: false,
    })
}

fn fanout_figure(section: &SectionReport) -> Option<Figure> {
    let time = panel(
        section,
        "Median time until a fork has read its working set, ms (logarithmic)",
        Measure::ReadyMs,
        "ms",
        Axis::Logarithmic,
    )?;
    let memory = panel(
        section,
        "Memory of all forks together (PSS), MiB",
        Measure::PssMib,
        "MiB",
        Axis::Linear,
    )?;
    Some(Figure {
        title: "Many forks at once",
        subtitle: first_sentence(section),
        panels: vec![time, memory],
        beside: false,
    })
}

fn growth_figure(section: &SectionReport) -> Option<Figure> {
    let forks: Vec<&Row> = section
        .rows
        .iter()
        .filter(|row| row.subject.name == growth::FORKS)
        .collect();
    let templates: Vec<&Row> = section
        .rows
        .iter()
        .filter(|row| row.subject.name == growth::TEMPLATES)
        .collect();
    let panels = [
        growing(
            &forks,
            "Private memory of the server, MiB",
            "served forks of 1 GiB",
            false,
            &[(Measure::ServerOwnMib, "private", OURS)],
            Some((32.0, "goal: at most 32 MiB with 200".to_owned())),
        ),
        growing(
            &templates,
            "Time of a fault, us",
            "size of the sparse template",
            true,
            &[(Measure::FaultP50Us, "p50", OURS), (Measure::FaultP99Us, "p99", RIVAL)],
            None,
        ),
    ];
    let panels: Vec<Panel> = panels.into_iter().flatten().map(Panel::Lines).collect();
    (!panels.is_empty()).then(|| Figure {
        title: "Growth of cost",
        subtitle: "With the number of forks, and with the size of the template.".to_owned(),
        panels,
        beside: true,
    })
}

fn growing(
    rows: &[&Row],
    title: &str,
    x_title: &str,
    by_factors: bool,
    measures: &[(Measure, &str, Ink)],
    goal: Option<(f64, String)>,
) -> Option<Lines> {
    let x_of = |row: &Row| row.x.map(crate::spread::to_f64);
    let x_ticks: Vec<(f64, String)> = rows
        .iter()
        .filter_map(|row| Some((x_of(row)?, row.subject.setting.replace(" template", ""))))
        .collect();
    let series = measures.iter().map(|(measure, label, ink)| Line {
        label: (*label).to_owned(),
        ink: *ink,
        points: rows
            .iter()
            .filter_map(|row| {
                let spread = row.values.get(measure)?.spread;
                Some((x_of(row)?, spread.median, (spread.low, spread.high)))
            })
            .collect(),
    });
    (!x_ticks.is_empty()).then(|| Lines {
        title: title.to_owned(),
        x_title: x_title.to_owned(),
        by_factors,
        x_ticks,
        series: series.collect(),
        goal,
    })
}

/// Creates the figure of all goals, each relative to its limit, on one axis.
fn goals_picture(report: &Report) -> Option<Picture> {
    const LEAST: f64 = 0.25;
    const MOST: f64 = 4.0;
    const LABEL: f64 = 12.0;
    let goals: Vec<&GoalReport> = report.goals().map(|(_, goal)| goal).collect();
    if goals.is_empty() {
        return None;
    }
    let rows = f64::from(u32::try_from(goals.len()).unwrap_or(1));
    let row_height = ROW + 8.0;
    let mut picture = framed(
        "Goals and measurements",
        "Each measurement as a multiple of its limit, with its 95% interval. Left of the line is better.",
        report,
        rows * row_height + 40.0,
    );
    let widest = |of: &dyn Fn(&GoalReport) -> String| {
        goals.iter().map(|goal| width(&of(goal), LABEL)).fold(0.0, f64::max) * 1.04
    };
    let (left, right) = (
        MARGIN + widest(&title_of) + 16.0,
        WIDTH - MARGIN - widest(&note_of) - 22.0,
    );
    let place = |times: f64| {
        let part = (times.clamp(LEAST, MOST) / LEAST).log2() / (MOST / LEAST).log2();
        left + part * (right - left)
    };
    let (top, bottom) = (HEAD + 4.0, HEAD + 4.0 + rows * row_height);
    picture.rect(at(left, top), at(place(1.0), bottom), MET.light_more());
    picture.rect(at(place(1.0), top), at(right, bottom), GOAL.light_more());
    for (times, text) in [(0.25, "1/4"), (0.5, "1/2"), (1.0, "limit"), (2.0, "2 x"), (4.0, "4 x")] {
        picture.line(at(place(times), top), at(place(times), bottom), GRID, 1.0);
        picture.text(at(place(times), bottom + 14.0), text, FAINT_TEXT, 11.0, Anchor::Middle);
    }
    picture.line(at(place(1.0), top), at(place(1.0), bottom), TEXT, 1.5);
    let mut middle = top + row_height / 2.0;
    for goal in goals {
        let ink = match goal.verdict {
            Verdict::Met => MET,
            Verdict::Missed => GOAL,
            Verdict::TooNoisyToTell => UNKNOWN,
        };
        let times = |measured: f64| match goal.goal {
            Goal::AtMost(limit) => measured / limit,
            Goal::AtLeast(limit) => limit / measured,
        };
        let (one, other) = (place(times(goal.measured.low)), place(times(goal.measured.high)));
        picture.line(at(one.min(other), middle), at(one.max(other), middle), ink, 4.0);
        picture.dot(at(place(times(goal.measured.median)), middle), 6.5, ink);
        picture.text(at(left - 10.0, middle), title_of(goal), TEXT, LABEL, Anchor::End);
        picture.text(at(right + 16.0, middle), note_of(goal), ink, LABEL, Anchor::Start);
        middle += row_height;
    }
    Some(picture)
}

fn title_of(goal: &GoalReport) -> String {
    goal.what.replace('`', "")
}

fn note_of(goal: &GoalReport) -> String {
    let times = if goal.to.is_some() { " x" } else { "" };
    format!(
        "{:.2}{times}, {}{times}: {}",
        goal.measured.median, goal.goal, goal.verdict
    )
}
