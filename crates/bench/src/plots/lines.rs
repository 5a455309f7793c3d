//! A panel of lines over a growing quantity.

use super::bars::{round_step, short};
use super::picture::{Anchor, FAINT_TEXT, GOAL, GRID, Ink, Picture, Point, TEXT, at};
use super::render::width as width_of;

pub(super) const HEIGHT: f64 = 300.0;
const TITLE: f64 = 40.0;
const AXIS: f64 = 50.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 26.0;
const TICK_SIZE: f64 = 11.0;
const LABEL_SIZE: f64 = 12.0;

/// A line.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) label: String,
    pub(super) ink: Ink,
    /// A point: its position, its number, and its interval.
    pub(super) points: Vec<(f64, f64, (f64, f64))>,
}

#[derive(Clone, Debug)]
pub(super) struct Lines {
    pub(super) title: String,
    /// The quantity on the x axis.
    pub(super) x_title: String,
    /// Whether it grows by factors rather than by steps.
    pub(super) by_factors: bool,
    /// Positions of the ticks, and their labels.
    pub(super) x_ticks: Vec<(f64, String)>,
    pub(super) series: Vec<Line>,
    /// The upper limit of all lines, and its label.
    pub(super) goal: Option<(f64, String)>,
}

impl Lines {
    /// Draws the panel with its upper left corner at this point.
    pub(super) fn draw(&self, picture: &mut Picture, corner: Point, width: f64) {
        let (left, right) = (corner.x + LEFT, corner.x + width - RIGHT);
        let (top, bottom) = (corner.y + TITLE, corner.y + HEIGHT - AXIS);
        picture.bold(at(corner.x, corner.y + 12.0), &self.title, TEXT, 13.0, Anchor::Start);

        let values = self
            .series
            .iter()
            .flat_map(|line| line.points.iter().map(|point| point.2.1));
        let most = values.chain(self.goal.as_ref().map(|goal| goal.0)).fold(0.0, f64::max) * 1.12;
        let most = if most > 0.0 { most } else { 1.0 };
        let y = |value: f64| bottom - value / most * (bottom - top);
        let step = round_step(most / 4.0);
        let mut tick = 0.0;
        while tick <= most {
            picture.line(at(left, y(tick)), at(right, y(tick)), GRID, 1.0);
            picture.text(at(left - 8.0, y(tick)), short(tick), FAINT_TEXT, TICK_SIZE, Anchor::End);
            tick += step;
        }

        let along = |value: f64| if self.by_factors { value.log2() } else { value };
        let places = || self.x_ticks.iter().map(|(x, _)| along(*x));
        let (first, last) = (
            places().fold(f64::INFINITY, f64::min),
            places().fold(f64::NEG_INFINITY, f64::max),
        );
        let range = if last > first { last - first } else { 1.0 };
        let x = |value: f64| left + 14.0 + (along(value) - first) / range * (right - left - 28.0);
        let mut free_from = left;
        for (value, text) in &self.x_ticks {
            let half = width_of(text, TICK_SIZE) / 2.0;
            if x(*value) - half < free_from {
                continue;
            }
            free_from = x(*value) + half + 6.0;
            picture.line(at(x(*value), bottom), at(x(*value), bottom + 4.0), FAINT_TEXT, 1.0);
            picture.text(
                at(x(*value), bottom + 14.0),
                text,
                FAINT_TEXT,
                TICK_SIZE,
                Anchor::Middle,
            );
        }
        let middle = f64::midpoint(left, right);
        picture.text(
            at(middle, bottom + 34.0),
            &self.x_title,
            FAINT_TEXT,
            LABEL_SIZE,
            Anchor::Middle,
        );

        if let Some((goal, text)) = &self.goal {
            picture.dashed(at(left, y(*goal)), at(right, y(*goal)), GOAL, 2.0);
            picture.text(at(left + 6.0, y(*goal) - 11.0), text, GOAL, LABEL_SIZE, Anchor::Start);
        }
        for line in &self.series {
            for pair in line.points.windows(2) {
                picture.line(
                    at(x(pair[0].0), y(pair[0].1)),
                    at(x(pair[1].0), y(pair[1].1)),
                    line.ink,
                    2.5,
                );
            }
            for (place, value, (low, high)) in &line.points {
                picture.line(at(x(*place), y(*low)), at(x(*place), y(*high)), line.ink, 1.5);
                picture.dot(at(x(*place), y(*value)), 4.5, line.ink);
            }
            if let Some((place, value, _)) = line.points.last() {
                picture.text(
                    at(x(*place), y(*value) - 16.0),
                    &line.label,
                    line.ink,
                    LABEL_SIZE,
                    Anchor::End,
                );
            }
        }
    }
}
