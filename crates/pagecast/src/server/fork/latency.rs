//! Durations, counted in buckets.

use std::time::Duration;

use histogram::{Config, Histogram};

/// Buckets a sixteenth wide, up to 2^40 ns (18 minutes, far beyond every deadline).
const GROUPING: u8 = 4;
const POWER: u8 = 40;

/// A snapshot of counted durations. Others can be [added](Self::merge) to it.
///
/// Buckets are a sixteenth wide, so a single duration may appear up to 7 percent too long, never too short. Count and
/// sum are exact.
#[derive(Clone, Debug)]
pub struct LatencyHistogram {
    /// In nanoseconds.
    counts: Histogram,
    sum: Duration,
}

/// Times in microseconds, rounded up, to within 7 percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Half were at most this long.
    pub p50: u64,
    /// 99 of 100 were at most this long.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl LatencyHistogram {
    /// The longest duration that has a bucket, in nanoseconds.
    pub(in crate::server) const LONGEST_NS: u64 = (1 << POWER) - 1;

    /// The buckets of all histograms, in nanoseconds.
    pub(in crate::server) fn buckets() -> Config {
        Config::new(GROUPING, POWER).expect("constants that fit each other")
    }

    /// Creates an empty histogram.
    pub fn new() -> Self {
        Self::of_counts(Histogram::with_config(&Self::buckets()), Duration::ZERO)
    }

    /// Creates the histogram of `counts`, which are in these [buckets](Self::buckets). `sum` is that of all durations.
    pub(in crate::server) fn of_counts(counts: Histogram, sum: Duration) -> Self {
        Self { counts, sum }
    }

    /// The number of durations.
    pub fn count(&self) -> u64 {
        self.counts.as_slice().iter().sum()
    }

    /// The sum of all durations.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// For each of `bounds`, in ascending order, the number of durations that were at most as long. A duration counts
    /// as longer if the bound cuts its bucket in two. A bound that is a power of two in nanoseconds cuts none.
    pub fn cumulative(&self, bounds: &[Duration]) -> Vec<u64> {
        let mut counts = vec![0; bounds.len()];
        for bucket in self.counts.iter().filter(|bucket| bucket.count() > 0) {
            let longest = Duration::from_nanos(bucket.end());
            let first = bounds.partition_point(|bound| *bound < longest);
            for count in counts.iter_mut().skip(first) {
                *count += bucket.count();
            }
        }
        counts
    }

    /// The duration that this fraction (from 0 to 1) did not exceed; `None` if there are no durations.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let bucket = self.counts.quantile_bucket(part).ok().flatten()?;
        Some(Duration::from_nanos(bucket.end()))
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        // They have the same buckets; none of them holds 2^64.
        let _ = self.counts.checked_add_assign(&other.counts);
        self.sum = self.sum.saturating_add(other.sum);
    }

    /// The main figures.
    pub fn summary(&self) -> Latency {
        let micros = |part| {
            let time = self.quantile(part).unwrap_or_default();
            u64::try_from(time.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX)
        };
        Latency {
            p50: micros(0.5),
            p99: micros(0.99),
            max: micros(1.0),
        }
    }
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self::new()
    }
}
