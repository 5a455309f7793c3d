//! Counters of the pages of a fork, written by one thread and readable by all.

mod latency_recorder;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::server::fork::{FaultCounts, ForkStats, PrefaultCounts};
use latency_recorder::LatencyRecorder;

/// A number that one thread counts up and any thread reads.
#[derive(Debug, Default)]
pub(in crate::server) struct Counter(AtomicU64);

impl Counter {
    /// A load and a store instead of a locked addition: there is only one writer.
    pub(in crate::server) fn add(&self, count: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    pub(in crate::server) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of a fork's pages.
#[derive(Debug)]
pub(in crate::server) struct Counters {
    pub(in crate::server) demand: Counter,
    pub(in crate::server) zero: Counter,
    pub(in crate::server) removed: Counter,
    pub(in crate::server) prefaulted: Counter,
    pub(in crate::server) retried: Counter,
    pub(in crate::server) slow: Counter,
    /// Installed by fault-around.
    pub(in crate::server) around: Counter,
    pub(in crate::server) installed_bytes: Counter,
    /// Bytes of zeros that the kernel fills in by itself.
    pub(in crate::server) given_back_bytes: Counter,
    pub(in crate::server) late: Counter,
    pub(in crate::server) missed: Counter,
    pub(in crate::server) held_out_used: Counter,
    /// From reading a fault until its page is installed.
    pub(in crate::server) fault_latency: LatencyRecorder,
    /// The time of the kernel to install a page that a vCPU waits for.
    pub(in crate::server) install_latency: LatencyRecorder,
}

impl Counters {
    pub(super) fn new() -> Self {
        Self {
            demand: Counter::default(),
            zero: Counter::default(),
            removed: Counter::default(),
            prefaulted: Counter::default(),
            retried: Counter::default(),
            slow: Counter::default(),
            around: Counter::default(),
            installed_bytes: Counter::default(),
            given_back_bytes: Counter::default(),
            late: Counter::default(),
            missed: Counter::default(),
            held_out_used: Counter::default(),
            fault_latency: LatencyRecorder::new(),
            install_latency: LatencyRecorder::new(),
        }
    }

    pub(in crate::server) fn stats(&self) -> ForkStats {
        ForkStats {
            faults: FaultCounts {
                demand: self.demand.get(),
                zero: self.zero.get(),
                removed: self.removed.get(),
                prefaulted: self.prefaulted.get(),
                retried: self.retried.get(),
                slow: self.slow.get(),
                around: self.around.get(),
            },
            fault_latency_us: self.fault_latency.load().summary(),
            installed_bytes: self.installed_bytes.get(),
            given_back_bytes: self.given_back_bytes.get(),
            prefault: PrefaultCounts {
                late: self.late.get(),
                missed: self.missed.get(),
                held_out_used: self.held_out_used.get(),
            },
        }
    }
}
