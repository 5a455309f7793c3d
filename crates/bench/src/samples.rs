//! Measurements of a section, until they become a report.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::measure::Measure;
use crate::spread::Spread;

/// The subject of a measurement: its name, and its setting ("20 forks").
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Subject {
    /// The setting; empty if there is only one.
    pub setting: String,
    /// The name.
    pub name: &'static str,
}

impl Subject {
    pub(crate) fn new(setting: impl Into<String>, name: &'static str) -> Self {
        let setting = setting.into();
        Self { setting, name }
    }
}

/// A subject and all its measurements.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The subject.
    #[serde(flatten)]
    pub subject: Subject,
    /// The number of the setting, for a plot: forks, or bytes of the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x: Option<u64>,
    /// The measurements.
    pub values: BTreeMap<Measure, Value>,
}

/// The value of a measure of a subject.
#[derive(Clone, Debug, Serialize)]
pub struct Value {
    /// In the unit of the measure.
    #[serde(flatten)]
    pub spread: Spread,
    /// The ratio of paired rounds to another subject in the same setting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<Ratio>,
}

/// A ratio of paired rounds to another subject.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// The name of the other subject.
    pub to: &'static str,
    /// The ratios of the rounds.
    #[serde(flatten)]
    pub spread: Spread,
}

/// Measurements in the order of their rounds, by subject and measure. Subjects keep the order of their first
/// measurement.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    subjects: Vec<(Subject, Option<u64>)>,
    values: BTreeMap<(usize, Measure), Vec<Sample>>,
    round: u32,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Sample {
    round: u32,
    value: f64,
}

impl Samples {
    /// Adds a subject without measurements, so that it comes before later ones.
    pub(crate) fn expect(&mut self, subject: Subject, x: Option<u64>) {
        if self.index(&subject).is_none() {
            self.subjects.push((subject, x));
        }
    }

    /// Starts another round: only measurements of the same round are compared.
    pub(crate) fn next_round(&mut self) {
        self.round += 1;
    }

    /// Adds a measurement of this round.
    pub(crate) fn add(&mut self, subject: &Subject, measure: Measure, value: f64) {
        let index = self.index(subject).unwrap_or_else(|| {
            self.subjects.push((subject.clone(), None));
            self.subjects.len() - 1
        });
        let round = self.round;
        self.values
            .entry((index, measure))
            .or_default()
            .push(Sample { round, value });
    }

    pub(crate) fn spread(&self, subject: &Subject, measure: Measure) -> Option<Spread> {
        Spread::of(self.of(subject, measure)?.iter().map(|sample| sample.value))
    }

    /// Returns the ratio of each turn of one subject to the paired turn of the other: that of the same round and
    /// number, or the median of that round if it has fewer.
    pub(crate) fn ratio(&self, subject: &Subject, to: &Subject, measure: Measure) -> Option<Spread> {
        let (these, others) = (self.of(subject, measure)?, self.of(to, measure)?);
        let of_round = |samples: &[Sample], round: u32| -> Vec<f64> {
            let of_round = samples.iter().filter(|sample| sample.round == round);
            of_round.map(|sample| sample.value).collect()
        };
        let mut ratios = Vec::new();
        for round in 0..=self.round {
            let (these, others) = (of_round(these, round), of_round(others, round));
            if these.len() == others.len() {
                ratios.extend(these.iter().zip(&others).map(|(this, other)| this / other));
            } else if let Some(other) = Spread::of(others) {
                ratios.extend(these.iter().map(|this| this / other.median));
            }
        }
        Spread::of(ratios)
    }

    fn of(&self, subject: &Subject, measure: Measure) -> Option<&Vec<Sample>> {
        self.values.get(&(self.index(subject)?, measure))
    }

    fn index(&self, subject: &Subject) -> Option<usize> {
        self.subjects.iter().position(|(known, _)| known == subject)
    }

    /// Returns all subjects with measurements, each beside the subject of this name in its setting.
    pub(crate) fn rows(&self, beside: &'static str) -> Vec<Row> {
        let row = |(index, (subject, x)): (usize, &(Subject, Option<u64>))| {
            let other = Subject::new(subject.setting.clone(), beside);
            let of_subject = self.values.range((index, Measure::FIRST)..=(index, Measure::LAST));
            let values: BTreeMap<Measure, Value> = of_subject
                .filter_map(|((_, measure), values)| {
                    let ratio = (measure.is_compared() && subject.name != beside)
                        .then(|| self.ratio(subject, &other, *measure))
                        .flatten()
                        .map(|spread| Ratio { to: beside, spread });
                    let spread = Spread::of(values.iter().map(|sample| sample.value))?;
                    Some((*measure, Value { spread, ratio }))
                })
                .collect();
            (!values.is_empty()).then(|| Row {
                subject: subject.clone(),
                x: *x,
                values,
            })
        };
        self.subjects.iter().enumerate().filter_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let (floor, ours) = (Subject::new("1 fork", "floor"), Subject::new("1 fork", "pagecast"));
        let mut samples = Samples::default();
        for (floor_us, ours_us) in [(1.0, 1.2), (10.0, 9.0), (100.0, 130.0)] {
            samples.add(&floor, Measure::FaultP50Us, floor_us);
            samples.add(&ours, Measure::FaultP50Us, ours_us);
        }
        let ratio = samples.ratio(&ours, &floor, Measure::FaultP50Us).unwrap();
        assert!((ratio.median - 1.2).abs() < 1e-9, "{ratio:?}");
        let rows = samples.rows("floor");
        assert!(rows[0].values[&Measure::FaultP50Us].ratio.is_none());
        assert_eq!(rows[1].values[&Measure::FaultP50Us].ratio.as_ref().unwrap().to, "floor");
    }

    #[test]
    fn turns_are_set_beside_those_of_their_own_round() {
        let (floor, ours) = (Subject::new("", "floor"), Subject::new("", "pagecast"));
        let mut samples = Samples::default();
        for (floors, ours_ms) in [
            ([1.0, 2.0, 3.0], 4.0),
            ([10.0, 20.0, 30.0], 60.0),
            ([1.0, 1.0, 1.0], 9.0),
        ] {
            for floor_ms in floors {
                samples.add(&floor, Measure::ReadyMs, floor_ms);
            }
            samples.add(&ours, Measure::ReadyMs, ours_ms);
            samples.next_round();
        }
        let ratio = samples.ratio(&ours, &floor, Measure::ReadyMs).unwrap();
        assert_eq!(ratio.count, 3);
        assert!(
            (ratio.min - 2.0).abs() < 1e-9 && (ratio.median - 3.0).abs() < 1e-9,
            "{ratio:?}"
        );
    }

    #[test]
    fn a_subject_without_numbers_is_no_row() {
        let mut samples = Samples::default();
        samples.expect(Subject::new("", "later"), None);
        samples.add(&Subject::new("", "now"), Measure::ReadyMs, 1.0);
        let rows = samples.rows("floor");
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].subject.name, "now");
    }
}
