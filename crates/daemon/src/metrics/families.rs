//! Metrics in Prometheus' text format, as they are collected.

use std::time::Duration;

use pagecast::server::LatencyHistogram;
use prometheus::TextEncoder;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use tracing::error;

/// Metrics, each with its samples.
#[derive(Default)]
pub(super) struct Families(Vec<MetricFamily>);

/// For a metric with one sample.
pub(super) const NO_LABELS: [(&str, &str); 0] = [];

/// A number as Prometheus keeps it.
#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus has no other numbers; exact up to 2^53"
)]
pub(super) fn number(count: u64) -> f64 {
    count as f64
}

impl Families {
    /// Adds a metric that goes up and down.
    pub(super) fn gauge<V: Into<String>, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([(&'static str, V); N], f64)>,
    ) {
        let samples = samples.into_iter().map(|(labels, value)| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            let mut metric = metric(labels);
            metric.set_gauge(gauge);
            metric
        });
        self.add(name, help, MetricType::GAUGE, samples.collect());
    }

    /// Adds a metric that only goes up.
    pub(super) fn counter<V: Into<String>, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([(&'static str, V); N], f64)>,
    ) {
        let samples = samples.into_iter().map(|(labels, value)| {
            let mut counter = Counter::default();
            counter.set_value(value);
            let mut metric = metric(labels);
            metric.set_counter(counter);
            metric
        });
        self.add(name, help, MetricType::COUNTER, samples.collect());
    }

    /// Adds a histogram of times in seconds, in buckets up to each of `bounds`.
    pub(super) fn histogram<'a, V: Into<String>, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        bounds: &[Duration],
        samples: impl IntoIterator<Item = ([(&'static str, V); N], &'a LatencyHistogram)>,
    ) {
        let samples = samples.into_iter().map(|(labels, times)| {
            let counts = times.cumulative(bounds);
            let buckets = bounds.iter().zip(counts).map(|(bound, count)| {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(bound.as_secs_f64());
                bucket.set_cumulative_count(count);
                bucket
            });
            let mut histogram = Histogram::default();
            histogram.set_bucket(buckets.collect());
            histogram.set_sample_count(times.count());
            histogram.set_sample_sum(times.sum().as_secs_f64());
            let mut metric = metric(labels);
            metric.set_histogram(histogram);
            metric
        });
        self.add(name, help, MetricType::HISTOGRAM, samples.collect());
    }

    fn add(&mut self, name: &str, help: &str, kind: MetricType, samples: Vec<Metric>) {
        // The format has no metric without a sample.
        if samples.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(samples);
        self.0.push(family);
    }

    /// Returns all metrics as text.
    pub(super) fn text(&self) -> String {
        TextEncoder::new().encode_to_string(&self.0).unwrap_or_else(|error| {
            // The encoder refuses metrics without a name or sample. None of these lacks one.
            error!(%error, "cannot write the metrics");
            String::new()
        })
    }
}

fn metric<V: Into<String>, const N: usize>(labels: [(&'static str, V); N]) -> Metric {
    let labels = labels.map(|(name, value)| {
        let mut label = LabelPair::default();
        label.set_name(name.to_owned());
        label.set_value(value.into());
        label
    });
    Metric::from_label(labels.into())
}
