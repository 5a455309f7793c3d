//! What a measurement has to be.

use std::fmt;

use serde::Serialize;

/// What a measurement has to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    pub(super) fn is_met(self, measured: f64) -> bool {
        match self {
            Self::AtMost(most) => measured <= most,
            Self::AtLeast(least) => measured >= least,
        }
    }

    /// For a table; nothing where there is no goal.
    pub(super) fn verdict(met: Option<bool>) -> &'static str {
        match met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "<= {most}"),
            Self::AtLeast(least) => write!(f, ">= {least}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_at_its_edge_and_not_beyond() {
        assert!(Goal::AtMost(1.1).is_met(1.1) && !Goal::AtMost(1.1).is_met(1.11));
        assert!(Goal::AtLeast(0.8).is_met(0.8) && !Goal::AtLeast(0.8).is_met(0.79));
        assert!(
            !Goal::AtMost(1.0).is_met(f64::NAN),
            "what was not measured meets nothing"
        );
    }
}
