//! Durations, counted in buckets.

use std::time::Duration;

use histogram::{Config, Histogram};
use serde::Serialize;

/// Buckets a sixteenth wide, up to 2^40 ns (18 minutes, far beyond every deadline).
const GROUPING: u8 = 4;
const POWER: u8 = 40;

fn config() -> Config {
    Config::new(GROUPING, POWER).expect("constants that fit each other")
}

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Half were at most this long.
    pub p50: u64,
    /// 99 of 100 were at most this long.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl LatencyHistogram {
    /// Creates an empty histogram.
    pub fn new() -> Self {
        Self {
            counts: Histogram::with_config(&config()),
            sum: Duration::ZERO,
        }
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

#[cfg(target_os = "linux")]
mod recorder {
    use std::time::Duration;

    use histogram::{AtomicHistogram32, Histogram};

    use super::{LatencyHistogram, POWER, config};
    use crate::server::counters::Counter;

    /// The histogram while it is counted: by one thread, readable by all. Takes 2.3 KiB.
    #[derive(Debug)]
    pub(in crate::server) struct LatencyRecorder {
        /// In nanoseconds.
        counts: AtomicHistogram32,
        sum_ns: Counter,
    }

    impl LatencyRecorder {
        pub(in crate::server) fn new() -> Self {
            Self {
                counts: AtomicHistogram32::with_config(&config()),
                sum_ns: Counter::default(),
            }
        }

        pub(in crate::server) fn record(&self, time: Duration) {
            let longest = (1 << POWER) - 1;
            let nanos = u64::try_from(time.as_nanos()).map_or(longest, |nanos| nanos.min(longest));
            // Cannot fail: the value is in range.
            let _ = self.counts.increment(nanos);
            self.sum_ns.add(nanos);
        }

        pub(in crate::server) fn load(&self) -> LatencyHistogram {
            LatencyHistogram {
                counts: Histogram::from(&self.counts.load()),
                sum: Duration::from_nanos(self.sum_ns.get()),
            }
        }
    }
}

#[cfg(target_os = "linux")]
pub(in crate::server) use recorder::LatencyRecorder;

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn of(times: &[u64]) -> LatencyHistogram {
        let recorder = LatencyRecorder::new();
        for micros in times {
            recorder.record(Duration::from_micros(*micros));
        }
        recorder.load()
    }

    #[test]
    fn latencies_come_back_in_microseconds_within_a_sixteenth() {
        let mut times = vec![10; 99];
        times.push(200_000);
        let latency = of(&times).summary();
        assert!((10..=11).contains(&latency.p50), "{latency:?}");
        assert!((200_000..=213_000).contains(&latency.max), "{latency:?}");
        assert_eq!(LatencyHistogram::new().summary(), Latency::default());
    }

    #[test]
    fn times_up_to_a_bound_are_counted_and_the_rest_is_not() {
        let histogram = of(&[1, 5, 5, 900, 7_000_000]);
        let bounds = [2, 10, 1000, 10_000_000].map(Duration::from_micros);
        assert_eq!(histogram.cumulative(&bounds), [1, 3, 4, 5]);
        assert_eq!(histogram.cumulative(&[]), [0; 0]);
        assert_eq!(histogram.count(), 5);
        assert_eq!(histogram.sum(), Duration::from_micros(7_000_911));
    }

    #[test]
    fn what_was_counted_apart_adds_up() {
        let mut total = LatencyHistogram::new();
        total.merge(&of(&[1, 2, 3]));
        total.merge(&of(&[3, 4000]));
        let together = of(&[1, 2, 3, 3, 4000]);
        assert_eq!((total.count(), total.sum()), (together.count(), together.sum()));
        for part in [0.0, 0.5, 0.9, 1.0] {
            assert_eq!(total.quantile(part), together.quantile(part));
        }
    }

    #[test]
    fn a_time_beyond_all_buckets_is_the_longest() {
        let histogram = of(&[u64::MAX / 1000]);
        assert_eq!(histogram.count(), 1);
        assert!(histogram.quantile(1.0).unwrap() > Duration::from_mins(18));
    }
}
