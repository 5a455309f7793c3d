//! A panel of bars, or of dots if numbers differ by orders of magnitude.

use super::picture::{Anchor, FAINT_TEXT, GOAL, GRID, Ink, Picture, Point, TEXT, at};
use super::render::width;

pub(super) const ROW: f64 = 26.0;
const GROUP_GAP: f64 = 12.0;
const TITLE: f64 = 40.0;
const AXIS: f64 = 30.0;
const LABEL_SIZE: f64 = 12.0;
const NOTE_SIZE: f64 = 12.0;
const TICK_SIZE: f64 = 11.0;

/// The scale of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    /// Linear, from zero on: bars.
    Linear,
    /// Logarithmic: dots.
    Logarithmic,
}

/// One row: a number.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    /// Rows of the same group stay together. The group is drawn before the label of its first row.
    pub(super) group: String,
    pub(super) label: String,
    pub(super) value: f64,
    /// The interval of the number.
    pub(super) between: (f64, f64),
    pub(super) ink: Ink,
    /// A text after the bar.
    pub(super) note: String,
    /// The goal, at most or at least.
    pub(super) goal: Option<f64>,
}

/// A title and its rows, below each other.
#[derive(Clone, Debug)]
pub(super) struct Bars {
    pub(super) title: String,
    pub(super) axis: Axis,
    pub(super) rows: Vec<Bar>,
}

impl Bars {
    pub(super) fn height(&self) -> f64 {
        TITLE + self.tops().last().map_or(0.0, |top| top + ROW) + AXIS
    }

    /// Returns the upper edge of each row, relative to the first.
    fn tops(&self) -> Vec<f64> {
        let mut top = 0.0;
        let mut tops = Vec::new();
        for (index, bar) in self.rows.iter().enumerate() {
            if index > 0 {
                top += ROW;
                if self.rows[index - 1].group != bar.group {
                    top += GROUP_GAP;
                }
            }
            tops.push(top);
        }
        tops
    }

    /// Draws the panel with its upper left corner at this point.
    pub(super) fn draw(&self, picture: &mut Picture, corner: Point, panel_width: f64) {
        let widest = |texts: &mut dyn Iterator<Item = &String>, size: f64| {
            texts.map(|text| width(text, size)).fold(0.0, f64::max)
        };
        let groups = widest(&mut self.rows.iter().map(|bar| &bar.group), LABEL_SIZE) * 1.08;
        let labels = widest(&mut self.rows.iter().map(|bar| &bar.label), LABEL_SIZE) * 1.04;
        let notes = widest(&mut self.rows.iter().map(|bar| &bar.note), NOTE_SIZE) * 1.04;
        let group_gap = if groups > 0.0 { 16.0 } else { 0.0 };
        let left = corner.x + groups + group_gap + labels + 12.0;
        let right = (corner.x + panel_width - notes - 20.0).max(left + 60.0);
        let top = corner.y + TITLE;
        let tops = self.tops();
        let bottom = top + tops.last().copied().unwrap_or_default() + ROW + 4.0;

        picture.bold(at(corner.x, corner.y + 12.0), &self.title, TEXT, 13.0, Anchor::Start);
        let scale = Scale::of(self, left, right);
        for (value, text) in scale.ticks() {
            let x = scale.place(value);
            picture.line(at(x, top - 4.0), at(x, bottom), GRID, 1.0);
            picture.text(at(x, bottom + 12.0), text, FAINT_TEXT, TICK_SIZE, Anchor::Middle);
        }
        let mut last_group = "";
        for (bar, row_top) in self.rows.iter().zip(tops) {
            let middle = top + row_top + ROW / 2.0;
            if bar.group != last_group {
                picture.bold(at(corner.x, middle), &bar.group, TEXT, LABEL_SIZE, Anchor::Start);
                last_group = &bar.group;
            }
            picture.text(at(left - 10.0, middle), &bar.label, TEXT, LABEL_SIZE, Anchor::End);
            let end = scale.place(bar.value);
            match self.axis {
                Axis::Linear => picture.rect(at(left, middle - 8.0), at(end, middle + 8.0), bar.ink),
                Axis::Logarithmic => {
                    picture.rect(at(left, middle - 3.0), at(end, middle + 3.0), bar.ink.light());
                    picture.dot(at(end, middle), 6.0, bar.ink);
                }
            }
            let (low, high) = (scale.place(bar.between.0), scale.place(bar.between.1));
            if high - low > 1.5 {
                picture.line(at(low, middle), at(high, middle), TEXT, 1.5);
                for x in [low, high] {
                    picture.line(at(x, middle - 4.0), at(x, middle + 4.0), TEXT, 1.5);
                }
            }
            if let Some(goal) = bar.goal {
                let x = scale.place(goal);
                picture.line(
                    at(x, middle - ROW / 2.0 + 1.0),
                    at(x, middle + ROW / 2.0 - 1.0),
                    GOAL,
                    2.5,
                );
            }
            let behind = end.max(high).max(bar.goal.map_or(left, |goal| scale.place(goal)));
            picture.text(at(behind + 10.0, middle), &bar.note, TEXT, NOTE_SIZE, Anchor::Start);
        }
    }
}

/// Maps numbers to positions.
pub(super) struct Scale {
    axis: Axis,
    from: f64,
    to: f64,
    left: f64,
    right: f64,
}

impl Scale {
    fn of(bars: &Bars, left: f64, right: f64) -> Self {
        let all = || {
            bars.rows
                .iter()
                .flat_map(|bar| [Some(bar.value), Some(bar.between.0), Some(bar.between.1), bar.goal])
                .flatten()
        };
        let most = all().fold(0.0, f64::max);
        match bars.axis {
            Axis::Linear => Self {
                axis: Axis::Linear,
                from: 0.0,
                to: if most > 0.0 { most } else { 1.0 },
                left,
                right,
            },
            Axis::Logarithmic => {
                let least = all().filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
                let least = if least.is_finite() { least } else { 1.0 };
                Self {
                    axis: Axis::Logarithmic,
                    from: least.log10() - 0.25,
                    to: most.max(least).log10() + 0.02,
                    left,
                    right,
                }
            }
        }
    }

    fn place(&self, value: f64) -> f64 {
        let value = match self.axis {
            Axis::Linear => value,
            Axis::Logarithmic => value.max(f64::MIN_POSITIVE).log10(),
        };
        let part = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        self.left + part * (self.right - self.left)
    }

    /// Returns round numbers in the range, with their labels.
    fn ticks(&self) -> Vec<(f64, String)> {
        match self.axis {
            Axis::Linear => {
                let step = round_step((self.to - self.from) / 4.0);
                std::iter::successors(Some(0.0), |value| Some(value + step))
                    .take_while(|value| *value <= self.to * 1.0001)
                    .map(|value| (value, short(value)))
                    .collect()
            }
            Axis::Logarithmic => {
                let steps: &[f64] = if self.to - self.from < 1.3 {
                    &[1.0, 2.0, 5.0]
                } else {
                    &[1.0]
                };
                let mut ticks = Vec::new();
                let mut power = self.from.floor();
                while power <= self.to {
                    for step in steps {
                        let value = step * 10_f64.powf(power);
                        if (self.from..=self.to).contains(&value.log10()) {
                            ticks.push((value, short(value)));
                        }
                    }
                    power += 1.0;
                }
                ticks
            }
        }
    }
}

/// The next of 1, 2, 2.5, 5 and 10 times a power of ten.
pub(super) fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.max(f64::MIN_POSITIVE).log10().floor());
    let round = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .find(|round| step <= round * power * 1.0001);
    round.unwrap_or(10.0) * power
}

/// Formats a round number in few letters.
pub(super) fn short(value: f64) -> String {
    let (value, unit) = match value {
        _ if value >= 1e6 => (value / 1e6, "M"),
        _ if value >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert!((round_step(0.21) - 0.25).abs() < 1e-9);
        assert!((round_step(30_000.0) - 50_000.0).abs() < 1e-6);
        assert_eq!(short(50_000.0), "50k");
        assert_eq!(short(2.5), "2.5");
        assert_eq!(short(0.0), "0");
        assert_eq!(short(1_000_000.0), "1M");
    }
}
