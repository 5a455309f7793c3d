//! Durations, while they are counted.

use std::time::Duration;

use histogram::{AtomicHistogram32, Histogram};

use super::Counter;
use crate::server::fork::LatencyHistogram;

/// The histogram while it is counted: by one thread, readable by all. Takes 2.3 KiB.
#[derive(Debug)]
pub(in crate::server) struct LatencyRecorder {
    /// In nanoseconds.
    counts: AtomicHistogram32,
    sum_ns: Counter,
}

impl LatencyRecorder {
    pub(super) fn new() -> Self {
        Self {
            counts: AtomicHistogram32::with_config(&LatencyHistogram::buckets()),
            sum_ns: Counter::default(),
        }
    }

    pub(in crate::server) fn record(&self, time: Duration) {
        let longest = LatencyHistogram::LONGEST_NS;
        let nanos = u64::try_from(time.as_nanos()).map_or(longest, |nanos| nanos.min(longest));
        // Cannot fail: the value is in range.
        let _ = self.counts.increment(nanos);
        self.sum_ns.add(nanos);
    }

    pub(in crate::server) fn load(&self) -> LatencyHistogram {
        let sum = Duration::from_nanos(self.sum_ns.get());
        LatencyHistogram::of_counts(Histogram::from(&self.counts.load()), sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::fork::Latency;

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
