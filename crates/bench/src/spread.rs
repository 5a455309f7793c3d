//! Statistics of repeated measurements.

use serde::Serialize;

/// Confidence of the [interval](Spread::low) of the median.
const CONFIDENCE: f64 = 0.95;

/// Statistics of repeated measurements of the same quantity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Number of measurements.
    pub count: usize,
    /// The minimum.
    pub min: f64,
    /// The first quartile.
    pub lower_quartile: f64,
    /// The lower end of the interval that has the true median with 95% confidence, for any distribution (sign test).
    /// The minimum for fewer than six measurements.
    pub low: f64,
    /// The median.
    pub median: f64,
    /// The upper end of that interval.
    pub high: f64,
    /// The third quartile.
    pub upper_quartile: f64,
    /// The maximum.
    pub max: f64,
}

impl Spread {
    /// `None` if there are no measurements, or one is not a number.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        values.sort_unstable_by(f64::total_cmp);
        let last = values.len() - 1;
        let skipped = outside_interval(values.len());
        Some(Self {
            count: values.len(),
            min: values[0],
            lower_quartile: quantile(&values, 0.25),
            low: values[skipped],
            median: quantile(&values, 0.5),
            high: values[last - skipped],
            upper_quartile: quantile(&values, 0.75),
            max: values[last],
        })
    }

    /// Width of the middle half, relative to the median.
    pub fn noise(&self) -> f64 {
        (self.upper_quartile - self.lower_quartile) / self.median
    }
}

/// Number of the `n` sorted values to leave out on each side of the interval of their median. It is the largest for
/// which the median is outside with a small enough chance: that of so few heads in `n` tosses of a coin.
fn outside_interval(count: usize) -> usize {
    let mut chance = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut below = chance;
    let mut skipped = 0;
    while below <= (1.0 - CONFIDENCE) / 2.0 && 2 * (skipped + 1) < count {
        skipped += 1;
        chance *= to_f64((count - skipped + 1) as u64) / to_f64(skipped as u64);
        below += chance;
    }
    skipped.saturating_sub(1)
}

/// Interpolates between two of the sorted values, of which there is at least one.
pub(crate) fn quantile(values: &[f64], part: f64) -> f64 {
    let at = part * to_f64(values.len() as u64 - 1);
    let below = at.floor();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of the slice"
    )]
    let index = below as usize;
    let next = (index + 1).min(values.len() - 1);
    values[index] + (values[next] - values[index]) * (at - below)
}

/// Converts to a number to calculate with.
#[expect(clippy::cast_precision_loss, reason = "what is measured here is far below 2^52")]
pub fn to_f64(value: u64) -> f64 {
    value as f64
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> f64 {
    to_f64(bytes) / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upto(count: u32) -> Spread {
        Spread::of((1..=count).map(f64::from)).unwrap()
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert!((upto(4).median - 2.5).abs() < 1e-9);
        assert!((upto(5).median - 3.0).abs() < 1e-9);
    }

    #[test]
    fn the_interval_of_the_median_is_that_of_the_tables() {
        // Ranks for a confidence of at least 95%, as in tables of the sign test.
        for (count, low) in [
            (3, 1.0),
            (5, 1.0),
            (6, 1.0),
            (9, 2.0),
            (11, 2.0),
            (20, 6.0),
            (25, 8.0),
            (50, 18.0),
        ] {
            let spread = upto(count);
            assert!((spread.low - low).abs() < 1e-9, "{count}: {spread:?}");
            assert!(
                (spread.high - (f64::from(count) + 1.0 - low)).abs() < 1e-9,
                "{count}: {spread:?}"
            );
        }
    }

    #[test]
    fn what_is_no_number_is_no_measurement() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([1.0, f64::NAN]), None);
    }

    #[test]
    fn noise_is_the_middle_half_to_the_median() {
        let spread = Spread::of([8.0, 9.0, 10.0, 11.0, 12.0]).unwrap();
        assert!((spread.noise() - 0.2).abs() < 1e-9, "{spread:?}");
    }
}
