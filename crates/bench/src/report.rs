//! What came of a run: for tables, JSON and plots alike.

use serde::Serialize;

use crate::goal::{Goal, Verdict};
use crate::machine::Machine;
use crate::measure::Measure;
use crate::samples::{Row, Samples, Subject};
use crate::section::{Scale, Section};
use crate::spread::Spread;

/// How wide the middle half of a floor's own measurements may be, as a part of their median, before a section says that the
/// machine is noisy.
const NOISY: f64 = 0.25;

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where and when.
    pub machine: Machine,
    /// How much was measured.
    pub scale: Scale,
    /// In the order in which they were measured.
    pub sections: Vec<SectionReport>,
    /// How long all of it took.
    pub seconds: f64,
}

/// What came of a section.
#[derive(Clone, Debug, Serialize)]
pub struct SectionReport {
    /// Which one.
    pub section: Section,
    /// What was done, in a few sentences.
    pub about: Vec<String>,
    /// All that was measured.
    pub rows: Vec<Row>,
    /// What had to be.
    pub goals: Vec<GoalReport>,
    /// What makes the numbers worth less.
    pub warnings: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

/// A goal, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct GoalReport {
    /// What had to be like that.
    pub what: String,
    /// What the measured ratio is to; none where the number itself is the goal.
    pub to: Option<String>,
    /// What had to be.
    pub goal: Goal,
    /// What was: the paired rounds' own ratios, or the number itself.
    pub measured: Spread,
    /// Whether it is.
    pub verdict: Verdict,
}

impl Report {
    /// All goals, with the section that each is from.
    pub fn goals(&self) -> impl Iterator<Item = (Section, &GoalReport)> {
        self.sections
            .iter()
            .flat_map(|section| section.goals.iter().map(|goal| (section.section, goal)))
    }

    /// The section, where it was measured.
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

    /// Adds a goal, where there is a measurement for it.
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

    /// Warns where what nothing of ours can change has varied by too much.
    pub(crate) fn warn_if_noisy(&mut self, samples: &Samples, floor: &Subject, measure: Measure) {
        let Some(noise) = samples.spread(floor, measure).map(|spread| spread.noise()) else {
            return;
        };
        if noise > NOISY {
            let setting = Some(&floor.setting).filter(|setting| !setting.is_empty());
            let setting = setting.map(|setting| format!(", {setting}")).unwrap_or_default();
            self.warnings.push(format!(
                "this machine is noisy: the middle half of \"{}{setting}\" ({}) is {:.0}% of its median wide; trust ratios \
                 rather than numbers",
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
