//! Goals of measurements, and their verdicts.

use std::fmt;

use serde::Serialize;

use crate::spread::Spread;

/// The goal of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// At most this number.
    AtMost(f64),
    /// At least this number.
    AtLeast(f64),
}

/// Whether a goal is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval of the median meets it.
    Met,
    /// The whole interval misses it.
    Missed,
    /// Only a part of the interval meets it.
    TooNoisyToTell,
}

impl Goal {
    /// Returns whether the goal is met, as far as these measurements show.
    pub fn verdict(self, measured: &Spread) -> Verdict {
        match (self.is_met(measured.low), self.is_met(measured.high)) {
            (true, true) => Verdict::Met,
            (false, false) => Verdict::Missed,
            _ => Verdict::TooNoisyToTell,
        }
    }

    /// Returns the number.
    pub fn limit(self) -> f64 {
        match self {
            Self::AtMost(limit) | Self::AtLeast(limit) => limit,
        }
    }

    fn is_met(self, measured: f64) -> bool {
        match self {
            Self::AtMost(most) => measured <= most,
            Self::AtLeast(least) => measured >= least,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "at most {most}"),
            Self::AtLeast(least) => write!(f, "at least {least}"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::Missed => "missed",
            Self::TooNoisyToTell => "too noisy to tell",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn between(low: f64, high: f64) -> Spread {
        Spread::of([low, high]).unwrap()
    }

    #[test]
    fn a_goal_is_met_at_its_edge_and_not_beyond() {
        let most = Goal::AtMost(1.1);
        assert_eq!(most.verdict(&between(0.9, 1.1)), Verdict::Met);
        assert_eq!(most.verdict(&between(1.11, 1.2)), Verdict::Missed);
        let least = Goal::AtLeast(0.8);
        assert_eq!(least.verdict(&between(0.8, 0.9)), Verdict::Met);
        assert_eq!(least.verdict(&between(0.7, 0.79)), Verdict::Missed);
    }

    #[test]
    fn an_interval_with_the_goal_inside_tells_nothing() {
        assert_eq!(Goal::AtMost(1.1).verdict(&between(1.0, 1.2)), Verdict::TooNoisyToTell);
        assert_eq!(Goal::AtLeast(1.1).verdict(&between(1.0, 1.2)), Verdict::TooNoisyToTell);
    }
}
