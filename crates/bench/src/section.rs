//! The sections, and the scales of measurement.

use clap::ValueEnum;
use serde::Serialize;

/// A part of the benchmark, about one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Section {
    /// Cost of a page fault
    Faults,
    /// Time until a fork has read its working set
    Ready,
    /// Speed of installing memory ahead of faults
    Prefault,
    /// Cost of a page of zeros
    Zeros,
    /// Many forks at once, in real Firecrackers if there is KVM
    Fanout,
    /// Growth of cost with forks and templates, and the cost of idle forks
    Growth,
}

impl Section {
    /// All sections, in their order.
    pub const ALL: [Self; 6] = [
        Self::Faults,
        Self::Ready,
        Self::Prefault,
        Self::Zeros,
        Self::Fanout,
        Self::Growth,
    ];

    /// Returns its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Faults => "faults",
            Self::Ready => "ready",
            Self::Prefault => "prefault",
            Self::Zeros => "zeros",
            Self::Fanout => "fanout",
            Self::Growth => "growth",
        }
    }
}

/// The scale of the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Enough measurements to publish.
    Full,
    /// Less than a minute in all.
    Quick,
    /// The minimum that shows that it works; its numbers have no meaning.
    Tiny,
}

impl Scale {
    /// Returns the value for this scale.
    pub(crate) fn choose<T>(self, full: T, quick: T, tiny: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
            Self::Tiny => tiny,
        }
    }
}
