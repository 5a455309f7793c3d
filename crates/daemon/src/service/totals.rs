//! Counters of forks, summed by template.

use std::collections::BTreeMap;

use pagecast::server::{FaultCounts, LatencyHistogram, PrefaultCounts};
use pagecast::template::SlowReadStats;
use pagecast_client::{Backend, ForkState};

use crate::fork::Fork;
use crate::template::TemplateName;

/// The backends that a fork can have.
pub(crate) const BACKENDS: [Backend; 2] = [Backend::Uffd, Backend::File];

/// Counts by backend and code of the reason.
pub(crate) type Reasons = BTreeMap<(Backend, String), u64>;

/// The counters of each template. Those of removed forks and templates are kept here, so that no counter ever goes
/// down. A scrape adds the existing ones to a copy.
#[derive(Clone, Default)]
pub(crate) struct Totals(BTreeMap<TemplateName, TemplateTotals>);

/// The counters of one template.
#[derive(Clone, Default)]
pub(crate) struct TemplateTotals {
    faults: FaultCounts,
    pub(crate) fault_latency: LatencyHistogram,
    pub(crate) install_latency: LatencyHistogram,
    pub(crate) installed_bytes: u64,
    pub(crate) given_back_bytes: u64,
    prefault: PrefaultCounts,
    pub(crate) reads: SlowReadStats,
    created: BTreeMap<Backend, u64>,
    ended: BTreeMap<(Backend, ForkState), u64>,
    /// Failures of forks.
    pub(crate) failures: Reasons,
    /// Refused connections: those that made a fork fail, and those that did not.
    pub(crate) refusals: Reasons,
    /// Killed VMMs: those of failed forks, and those that belonged to no fork of this daemon.
    pub(crate) kills: Reasons,
}

impl Totals {
    /// Adds the current counters of a fork.
    pub(crate) fn add(&mut self, fork: &Fork) {
        self.of(&fork.template.name).add(fork);
    }

    /// Adds the final counters of a fork that is being removed.
    pub(crate) fn keep(&mut self, fork: &Fork) {
        let totals = self.of(&fork.template.name);
        let state = totals.add(fork);
        if !state.is_end() {
            // Its VMM was never known, so its end will never be reported.
            *totals.ended.entry((fork.backend(), state)).or_default() += 1;
        }
    }

    /// Adds the reads of a template.
    pub(crate) fn add_reads(&mut self, template: &TemplateName, reads: SlowReadStats) {
        let total = &mut self.of(template).reads;
        total.reads += reads.reads;
        total.failed += reads.failed;
        total.bytes += reads.bytes;
        total.time += reads.time;
    }

    /// Counts a killed VMM that belongs to no fork in the registry.
    pub(crate) fn count_kill(&mut self, template: &TemplateName, backend: Backend, reason: &str) {
        count(&mut self.of(template).kills, backend, reason);
    }

    /// Removes the counters of a template.
    pub(crate) fn forget(&mut self, template: &TemplateName) {
        self.0.remove(template);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&TemplateName, &TemplateTotals)> {
        self.0.iter()
    }

    fn of(&mut self, template: &TemplateName) -> &mut TemplateTotals {
        self.0.entry(template.clone()).or_default()
    }
}

impl TemplateTotals {
    /// Adds a fork. Returns the state that was counted.
    fn add(&mut self, fork: &Fork) -> ForkState {
        let backend = fork.backend();
        let numbers = fork.numbers();
        *self.created.entry(backend).or_default() += 1;
        if let Some(served) = numbers.served {
            self.fault_latency.merge(&served.fault_latency);
            self.install_latency.merge(&served.install_latency);
            self.installed_bytes += served.stats.installed_bytes;
            self.given_back_bytes += served.stats.given_back_bytes;
            self.prefault.late += served.stats.prefault.late;
            self.prefault.missed += served.stats.prefault.missed;
            self.prefault.held_out_used += served.stats.prefault.held_out_used;
            self.add_faults(served.stats.faults);
            for (code, refused) in served.refusals {
                *self.refusals.entry((backend, code.to_owned())).or_default() += refused;
            }
        }
        if let Some(failure) = numbers.failure {
            count(&mut self.failures, backend, &failure.code);
            if failure.is_refusal {
                count(&mut self.refusals, backend, &failure.code);
            }
            if failure.is_kill {
                count(&mut self.kills, backend, &failure.code);
            }
        }
        if numbers.state.is_end() {
            *self.ended.entry((backend, numbers.state)).or_default() += 1;
        }
        numbers.state
    }

    fn add_faults(&mut self, faults: FaultCounts) {
        let total = &mut self.faults;
        total.demand += faults.demand;
        total.zero += faults.zero;
        total.removed += faults.removed;
        total.prefaulted += faults.prefaulted;
        total.retried += faults.retried;
        total.slow += faults.slow;
        total.around += faults.around;
    }

    /// Returns how first faults were predicted, by kind.
    pub(crate) fn prefault_by_kind(&self) -> [(&'static str, u64); 3] {
        let PrefaultCounts {
            late,
            missed,
            held_out_used,
            ..
        } = self.prefault;
        [("late", late), ("missed", missed), ("held_out", held_out_used)]
    }

    pub(crate) fn faults_by_kind(&self) -> [(&'static str, u64); 7] {
        let faults = &self.faults;
        [
            ("demand", faults.demand),
            ("zero", faults.zero),
            ("removed", faults.removed),
            ("prefaulted", faults.prefaulted),
            ("retried", faults.retried),
            ("slow", faults.slow),
            ("around", faults.around),
        ]
    }

    pub(crate) fn created(&self, backend: Backend) -> u64 {
        self.created.get(&backend).copied().unwrap_or(0)
    }

    /// Returns the number of ended forks by backend and state, zeros included.
    pub(crate) fn ended(&self) -> impl Iterator<Item = (Backend, ForkState, u64)> {
        let ends = ForkState::ALL.into_iter().filter(|state| state.is_end());
        let mut ended: BTreeMap<(Backend, ForkState), u64> = ends
            .flat_map(|state| BACKENDS.map(|backend| ((backend, state), 0)))
            .collect();
        ended.extend(&self.ended);
        ended
            .into_iter()
            .map(|((backend, state), count)| (backend, state, count))
    }
}

fn count(reasons: &mut Reasons, backend: Backend, reason: &str) {
    *reasons.entry((backend, reason.to_owned())).or_default() += 1;
}
