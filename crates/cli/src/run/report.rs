//! The result of a run, as data.

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

/// The result of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) template: String,
    pub(crate) firecracker: PathBuf,
    pub(crate) firecracker_version: String,
    /// The folder with a sub-folder for each fork, which has its API socket. Removed at the end of the run.
    pub(crate) folder: PathBuf,
    pub(crate) forks: Vec<ForkReport>,
    pub(crate) summary: Summary,
}

/// The result of one fork.
#[derive(Debug, Serialize)]
pub(crate) struct ForkReport {
    pub(crate) id: String,
    pub(crate) state: State,
    /// `None` if the daemon has not created the fork, like all fields below.
    pub(crate) backend: Option<Backend>,
    /// Why this backend was chosen.
    pub(crate) reason: Option<String>,
    pub(crate) pid: Option<i32>,
    pub(crate) load_ms: Option<f64>,
    pub(crate) resume_ms: Option<f64>,
    pub(crate) memory: Option<ForkMemory>,
    /// Why it failed, or how it ended.
    pub(crate) error: Option<String>,
}

/// The state of a fork of a run.
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
    /// Its guest has shut down, and Firecracker has ended.
    Exited,
    /// Its Firecracker has ended in another way.
    Died,
    /// Its guest never ran.
    Failed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The result of all forks together.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Summary {
    pub(crate) forks: usize,
    /// Number of guests that ran.
    pub(crate) resumed: usize,
    /// Time from the first request to the daemon until the last guest had resumed. All Firecrackers were started before
    /// that.
    pub(crate) all_ms: f64,
    pub(crate) load_ms: Option<Spread>,
    pub(crate) resume_ms: Option<Spread>,
    /// `None` if the daemon could measure no fork.
    pub(crate) memory: Option<Memory>,
}

/// The median and the maximum of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) max: f64,
}

/// The memory of all forks together, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Number of forks that were measured.
    pub(crate) measured: usize,
    /// Sum of their proportional set sizes.
    pub(crate) pss: u64,
    /// Memory that no other process shares.
    pub(crate) private: u64,
    /// Memory without sharing: the sum of all resident memory.
    pub(crate) unshared: u64,
}

impl Report {
    /// The report before the first event.
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

    /// Number of forks in a state for which `states` holds.
    pub(crate) fn count(&self, states: impl Fn(State) -> bool) -> usize {
        self.forks.iter().filter(|fork| states(fork.state)).count()
    }

    /// Whether each guest ran, and no Firecracker died.
    pub(crate) fn is_good(&self) -> bool {
        self.count(|state| matches!(state, State::Resumed | State::Exited)) == self.forks.len()
    }

    /// Each pair of backend and reason, with its number of forks.
    pub(crate) fn reasons(&self) -> BTreeMap<(Backend, &str), usize> {
        let mut reasons = BTreeMap::new();
        for fork in &self.forks {
            if let (Some(backend), Some(reason)) = (fork.backend, &fork.reason) {
                *reasons.entry((backend, reason.as_str())).or_default() += 1;
            }
        }
        reasons
    }

    /// Takes over the memory of the forks from the daemon's list.
    pub(crate) fn measure(&mut self, known: Vec<Fork>) {
        let mut memory: BTreeMap<_, _> = known.into_iter().map(|fork| (fork.id, fork.memory)).collect();
        for fork in &mut self.forks {
            fork.memory = memory.remove(&fork.id).flatten();
        }
    }

    /// Computes the summary. `all` is the time until the last guest had resumed.
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

    /// Applies an event.
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

/// Milliseconds, to the microsecond.
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
