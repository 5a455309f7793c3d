//! A strict parser of Prometheus' text format.

use std::collections::{BTreeMap, BTreeSet};

type Labels = BTreeMap<String, String>;

/// A parsed scrape.
#[derive(Debug, Default)]
pub(super) struct Scrape {
    families: BTreeMap<String, Family>,
}

#[derive(Debug)]
struct Family {
    kind: String,
    samples: BTreeMap<(String, Labels), f64>,
}

impl Scrape {
    /// Parses the text. Panics if it violates the format.
    pub(super) fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line has no end");
        let mut scrape = Self::default();
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            let (name, help) = line
                .strip_prefix("# HELP ")
                .and_then(|rest| rest.split_once(' '))
                .unwrap_or_else(|| panic!("a metric begins with its help: {line:?}"));
            assert!(is_name(name), "{line:?}");
            assert!(help.ends_with('.'), "{line:?}");
            let kind = lines.next().and_then(|line| {
                let (typed, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
                (typed == name).then_some(kind)
            });
            let kind = kind.unwrap_or_else(|| panic!("{name}: no type after its help"));
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{name}: {kind}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
            let mut samples = BTreeMap::new();
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let (series, labels, value) = sample(line);
                let suffix = series.strip_prefix(name);
                let suffixes: &[&str] = if kind == "histogram" {
                    &["_bucket", "_sum", "_count"]
                } else {
                    &[""]
                };
                assert!(
                    suffix.is_some_and(|suffix| suffixes.contains(&suffix)),
                    "{line:?} below {name}"
                );
                assert!(kind == "gauge" || value >= 0.0, "{line:?}");
                let before = samples.insert((series.to_owned(), labels), value);
                assert_eq!(before, None, "twice: {line:?}");
            }
            assert!(!samples.is_empty(), "{name} has no sample");
            let family = Family {
                kind: kind.to_owned(),
                samples,
            };
            if kind == "histogram" {
                family.check_histogram(name);
            }
            assert!(
                scrape.families.insert(name.to_owned(), family).is_none(),
                "twice: {name}"
            );
        }
        scrape
    }

    /// Returns the names of all metrics.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.families.keys().map(String::as_str).collect()
    }

    /// Returns the sum of all samples of this name (with the suffix, for histograms) that have these labels.
    pub(super) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let samples = self.families.values().flat_map(|family| &family.samples);
        samples
            .filter(|((sampled, with), _)| {
                let has = |(label, value): &(&str, &str)| with.get(*label).is_some_and(|with| with == value);
                sampled == name && labels.iter().all(has)
            })
            .map(|(_, value)| value)
            .sum()
    }

    /// Returns all values of a label in any metric.
    pub(super) fn values_of(&self, label: &str) -> BTreeSet<&str> {
        let samples = self.families.values().flat_map(|family| family.samples.keys());
        samples
            .filter_map(|(_, labels)| labels.get(label))
            .map(String::as_str)
            .collect()
    }

    /// Returns the sums of a metric that are not 0, by one of its labels.
    pub(super) fn by(&self, name: &str, label: &str, labels: &[(&str, &str)]) -> BTreeMap<String, f64> {
        let mut counts = BTreeMap::new();
        for value in self.values_of(label) {
            let mut labels = labels.to_vec();
            labels.push((label, value));
            let count = self.sum(name, &labels);
            if count > 0.0 {
                counts.insert(value.to_owned(), count);
            }
        }
        counts
    }

    /// Panics if a counter or histogram is lower than before, or missing.
    pub(super) fn check_not_below(&self, before: &Self) {
        for (name, family) in &before.families {
            if family.kind == "gauge" {
                continue;
            }
            for (sample, value) in &family.samples {
                let now = self.families.get(name).and_then(|family| family.samples.get(sample));
                assert!(
                    now.is_some_and(|now| now >= value),
                    "{sample:?} was {value} and is {now:?}"
                );
            }
        }
    }
}

impl Family {
    fn check_histogram(&self, name: &str) {
        // The buckets by their upper bound, grouped by all labels except `le`.
        let mut histograms: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        for ((sampled, labels), value) in &self.samples {
            let mut labels = labels.clone();
            let end = labels.remove("le");
            assert_eq!(sampled.ends_with("_bucket"), end.is_some(), "{sampled}");
            let buckets = histograms.entry(labels).or_default();
            if let Some(end) = end {
                buckets.push((number(&end), *value));
            }
        }
        for (labels, mut buckets) in histograms {
            buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
            assert!(
                buckets.is_sorted_by_key(|(_, count)| *count),
                "{name} {labels:?}: {buckets:?}"
            );
            let part = |suffix: &str| self.samples.get(&(format!("{name}{suffix}"), labels.clone()));
            let (end, all) = *buckets.last().unwrap();
            assert!(end.is_infinite() && end > 0.0, "{name} {labels:?}: no bucket for all");
            assert_eq!(part("_count"), Some(&all), "{name} {labels:?}");
            assert!(
                part("_sum").is_some_and(|sum| (*sum > 0.0) == (all > 0.0)),
                "{name} {labels:?}"
            );
        }
    }
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_lowercase())
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// `name{label="value",…} number`.
fn sample(line: &str) -> (&str, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line:?}"));
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => {
            let labels = labels.strip_suffix('}').unwrap_or_else(|| panic!("no end: {line:?}"));
            (name, parse_labels(labels))
        }
        None => (series, Labels::new()),
    };
    assert!(is_name(name), "{line:?}");
    (name, labels, number(value))
}

fn parse_labels(mut text: &str) -> Labels {
    let mut labels = Labels::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"").unwrap_or_else(|| panic!("{text:?}"));
        // No value here contains characters to escape.
        let (value, rest) = rest.split_once('"').unwrap_or_else(|| panic!("{text:?}"));
        assert!(is_name(name) && !value.is_empty() && !value.contains('\\'), "{text:?}");
        assert!(
            labels.insert(name.to_owned(), value.to_owned()).is_none(),
            "twice: {name}"
        );
        text = rest.strip_prefix(',').unwrap_or(rest);
    }
    labels
}

fn number(text: &str) -> f64 {
    match text {
        "+Inf" => f64::INFINITY,
        text => {
            let plain = text.bytes().all(|byte| b"0123456789.e-".contains(&byte));
            assert!(plain, "{text:?} is no number");
            text.parse().unwrap_or_else(|error| panic!("{text:?}: {error}"))
        }
    }
}
