//! The results of a run, for tables, JSON and plots.

use serde::Serialize;

use crate::goal::{Goal, Verdict};
use crate::machine::Machine;
use crate::measure::Measure;
use crate::samples::{Row, Samples, Subject};
use crate::section::{Scale, Section};
use crate::spread::Spread;

/// If the middle half of a floor's own measurements is wider than this part of their median, a section reports that the
/// machine is noisy.
const NOISY: f64 = 0.25;

/// The results of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The machine and time.
    pub machine: Machine,
    /// The scale of the measurements.
    pub scale: Scale,
    /// The sections, in the order of measurement.
    pub sections: Vec<SectionReport>,
    /// Duration of the run.
    pub seconds: f64,
}

/// The results of a section.
#[derive(Clone, Debug, Serialize)]
pub struct SectionReport {
    /// The section.
    pub section: Section,
    /// The method, in a few sentences.
    pub about: Vec<String>,
    /// All measurements.
    pub rows: Vec<Row>,
    /// The goals.
    pub goals: Vec<GoalReport>,
    /// Reasons to trust the numbers less.
    pub warnings: Vec<String>,
    /// Duration of the section.
    pub seconds: f64,
}

/// A goal and its result.
#[derive(Clone, Debug, Serialize)]
pub struct GoalReport {
    /// The quantity with the goal.
    pub what: String,
    /// The reference of the ratio; `None` if the goal is a number.
    pub to: Option<String>,
    /// The goal.
    pub goal: Goal,
    /// The measurement: the ratios of paired rounds, or the number.
    pub measured: Spread,
    /// The verdict.
    pub verdict: Verdict,
}

impl Report {
    /// Returns all goals, with their sections.
    pub fn goals(&self) -> impl Iterator<Item = (Section, &GoalReport)> {
        self.sections
            .iter()
            .flat_map(|section| section.goals.iter().map(|goal| (section.section, goal)))
    }

    /// Returns the section, if it was measured.
    pub fn section(&self, section: Section) -> Option<&SectionReport> {
        self.sections.iter().find(|report| report.section == section)
    }
}

impl SectionReport {
    pub(crate) fn new(section: Section, about: &[String], rows: Vec<Row>) -> Self {
        Self {
            section,
            about: about.to_vec(),
            rows,
            goals: Vec::new(),
            warnings: Vec::new(),
            seconds: 0.0,
        }
    }

    /// Adds a goal, if it was measured.
    pub(crate) fn goal(&mut self, what: impl Into<String>, to: Option<&str>, goal: Goal, measured: Option<Spread>) {
        let Some(measured) = measured else { return };
        self.goals.push(GoalReport {
            what: what.into(),
            to: to.map(str::to_owned),
            goal,
            measured,
            verdict: goal.verdict(&measured),
        });
    }

    /// Warns if a floor's measurements, which our code cannot influence, have varied too much.
    pub(crate) fn warn_if_noisy(&mut self, samples: &Samples, floor: &Subject, measure: Measure) {
        let Some(noise) = samples.spread(floor, measure).map(|spread| spread.noise()) else {
            return;
        };
        if noise > NOISY {
            let setting = Some(&floor.setting).filter(|setting| !setting.is_empty());
            let setting = setting.map(|setting| format!(", {setting}")).unwrap_or_default();
            self.warnings.push(format!(
                "this machine is noisy: the interquartile range of \"{}{setting}\" ({}) is {:.0}% of its median; ratios are \
                 more reliable than numbers",
                floor.name,
                measure.heading(),
                noise * 100.0,
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_that_varies_is_warned_of_and_a_steady_one_is_not() {
        let (calm, wild) = (Subject::new("1 fork", "calm"), Subject::new("", "wild"));
        let mut samples = Samples::default();
        for round in 0..8 {
            samples.add(&calm, Measure::FaultP50Us, 10.0 + f64::from(round) / 10.0);
            samples.add(&wild, Measure::FaultP50Us, 10.0 + f64::from(round));
        }
        let mut report = SectionReport::new(Section::Faults, &[], Vec::new());
        report.warn_if_noisy(&samples, &calm, Measure::FaultP50Us);
        assert_eq!(report.warnings, Vec::<String>::new());
        report.warn_if_noisy(&samples, &wild, Measure::FaultP50Us);
        assert!(
            report.warnings[0].contains("\"wild\" (p50, us)"),
            "{:?}",
            report.warnings
        );
    }

    #[test]
    fn what_was_not_measured_has_no_goal() {
        let mut report = SectionReport::new(Section::Zeros, &[], Vec::new());
        report.goal("touching zeros", Some("anonymous memory"), Goal::AtMost(1.3), None);
        assert!(report.goals.is_empty());
    }
}
