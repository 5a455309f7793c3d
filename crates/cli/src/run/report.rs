//! What came of a run, as data.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use pagecast_client::fork::ForkMemory;
use pagecast_client::{Backend, Fork};
use pagecast_firecracker::VmmError;
use serde::Serialize;

use super::firecracker::Firecracker;
use super::launch::Turn;

/// What came of it all.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) template: String,
    pub(crate) firecracker: PathBuf,
    pub(crate) firecracker_version: String,
    /// Where each fork has a folder, named as itself, with its API socket; gone once the run has ended.
    pub(crate) folder: PathBuf,
    pub(crate) forks: Vec<ForkReport>,
    pub(crate) summary: Summary,
}

/// What came of one fork.
#[derive(Debug, Serialize)]
pub(crate) struct ForkReport {
    pub(crate) id: String,
    pub(crate) state: State,
    /// Not known where it failed before the daemon made it, as all that follows.
    pub(crate) backend: Option<Backend>,
    /// Why this backend.
    pub(crate) reason: Option<String>,
    pub(crate) pid: Option<i32>,
    pub(crate) load_ms: Option<f64>,
    pub(crate) resume_ms: Option<f64>,
    pub(crate) memory: Option<ForkMemory>,
    /// Why it failed, or how it ended.
    pub(crate) error: Option<String>,
}

/// Where a fork of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Its Firecracker is being started.
    Starting,
    /// Its Firecracker waits for the snapshot.
    Started,
    /// Its Firecracker has loaded the snapshot.
    Loaded,
    /// Its guest runs.
    Resumed,
    /// Its Firecracker has ended as one ends whose guest has shut down.
    Exited,
    /// Its Firecracker has ended otherwise.
    Died,
    /// Its guest never ran.
    Failed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// All forks together.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Summary {
    pub(crate) forks: usize,
    /// How many guests ran.
    pub(crate) resumed: usize,
    /// From when the daemon was asked for the first until the last had resumed; each Firecracker ran before that.
    pub(crate) all_ms: f64,
    pub(crate) load_ms: Option<Spread>,
    pub(crate) resume_ms: Option<Spread>,
    /// Where the daemon could measure any.
    pub(crate) memory: Option<Memory>,
}

/// The middle and the end of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// What forks cost together, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// How many forks were measured.
    pub(crate) measured: usize,
    /// Their proportional shares.
    pub(crate) pss: u64,
    /// What they share with nobody.
    pub(crate) private: u64,
    /// What they would cost without sharing: everything resident, counted for each.
    pub(crate) unshared: u64,
}

impl Report {
    /// Before anything has happened.
    pub(crate) fn new(template: &str, firecracker: &Firecracker, folder: PathBuf, ids: &[String]) -> Self {
        Self {
            template: template.to_owned(),
            firecracker: firecracker.path.clone(),
            firecracker_version: firecracker.version.to_string(),
            folder,
            forks: ids.iter().map(|id| ForkReport::new(id)).collect(),
            summary: Summary::default(),
        }
    }

    /// How many are in one of these states.
    pub(crate) fn count(&self, states: impl Fn(State) -> bool) -> usize {
        self.forks.iter().filter(|fork| states(fork.state)).count()
    }

    /// Whether each guest ran, and no Firecracker died.
    pub(crate) fn is_good(&self) -> bool {
        self.count(|state| matches!(state, State::Resumed | State::Exited)) == self.forks.len()
    }

    /// Each pair of a backend and a reason for it, with the number of forks that have it.
    pub(crate) fn reasons(&self) -> BTreeMap<(Backend, &str), usize> {
        let mut reasons = BTreeMap::new();
        for fork in &self.forks {
            if let (Some(backend), Some(reason)) = (fork.backend, &fork.reason) {
                *reasons.entry((backend, reason.as_str())).or_default() += 1;
            }
        }
        reasons
    }

    /// Takes the memory of the forks from what the daemon says of all that it has.
    pub(crate) fn measure(&mut self, known: Vec<Fork>) {
        let mut memory: BTreeMap<_, _> = known.into_iter().map(|fork| (fork.id, fork.memory)).collect();
        for fork in &mut self.forks {
            fork.memory = memory.remove(&fork.id).flatten();
        }
    }

    /// Counts all forks together. `all` is how long it took until the last had resumed.
    pub(crate) fn sum_up(&mut self, all: Duration) {
        let measured: Vec<_> = self.forks.iter().filter_map(|fork| fork.memory).collect();
        let sum = |of: fn(&ForkMemory) -> u64| measured.iter().map(of).sum();
        let memory = Memory {
            measured: measured.len(),
            pss: sum(|memory| memory.pss),
            private: sum(|memory| memory.private),
            unshared: sum(|memory| memory.rss),
        };
        self.summary = Summary {
            forks: self.forks.len(),
            resumed: self.forks.iter().filter(|fork| fork.resume_ms.is_some()).count(),
            all_ms: milliseconds(all),
            load_ms: Spread::of(self.forks.iter().filter_map(|fork| fork.load_ms)),
            resume_ms: Spread::of(self.forks.iter().filter_map(|fork| fork.resume_ms)),
            memory: Some(memory).filter(|memory| memory.measured > 0),
        };
    }
}

impl ForkReport {
    fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            state: State::Starting,
            backend: None,
            reason: None,
            pid: None,
            load_ms: None,
            resume_ms: None,
            memory: None,
            error: None,
        }
    }

    /// Takes a turn of its life.
    pub(crate) fn turn(&mut self, turn: Turn) {
        match turn {
            Turn::Started { pid } => {
                self.state = State::Started;
                self.pid = Some(pid);
            }
            Turn::Created(created) => {
                self.backend = Some(created.backend);
                self.reason = Some(created.reason);
            }
            Turn::Loaded { load, .. } => {
                self.state = State::Loaded;
                self.load_ms = Some(milliseconds(load));
            }
            Turn::Resumed { resume } => {
                self.state = State::Resumed;
                self.resume_ms = Some(milliseconds(resume));
            }
            Turn::Failed(error) => {
                self.state = State::Failed;
                self.error = Some(format!("{:#}", anyhow::Error::from(error)));
            }
            Turn::Ended(error) => {
                self.state = match &error {
                    VmmError::Ended(status) if status.success() => State::Exited,
                    _ => State::Died,
                };
                self.error = Some(format!("{:#}", anyhow::Error::from(error)));
            }
        }
    }
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.collect();
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            median: *values.get(values.len() / 2)?,
            max: *values.last()?,
        })
    }
}

/// To the microsecond.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_no_values_there_is_no_spread() {
        assert_eq!(Spread::of(std::iter::empty()), None);
        let spread = Spread::of([3.0, 1.0, 2.0].into_iter()).unwrap();
        assert_eq!(spread, Spread { median: 2.0, max: 3.0 });
    }
}
