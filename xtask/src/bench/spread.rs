//! Several measurements of the same.

use serde::Serialize;

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Not numbers where there are none.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Self {
            min: at(0),
            median: at(values.len() / 2),
            max: at(values.len().saturating_sub(1)),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "what is measured here is far below 2^52")]
pub(super) fn to_f64(value: u64) -> f64 {
    value as f64
}

/// Bytes as MiB.
pub(super) fn mib(bytes: u64) -> f64 {
    to_f64(bytes) / f64::from(1 << 20)
}
