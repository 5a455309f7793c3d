//! Pictures as files.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use plotters::backend::{BitMapBackend, SVGBackend};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{
    Color as _, FontStyle, FontTransform, IntoFont as _, RGBAColor, RGBColor, ShapeStyle, register_font,
};

use super::picture::{Anchor, BACKGROUND, Ink, Picture, Point, Shape};

/// How many pixels a PNG has for one of a picture: screens are dense.
const PNG_SCALE: f64 = 2.0;
/// The family of the built-in font. An SVG names it, and is shown in what the viewer has of that kind.
const FAMILY: &str = "sans-serif";
/// A dash, and as much between two of them, in pixels.
const DASH: f64 = 5.0;

pub(super) fn svg(picture: &Picture, path: &Path) -> Result<()> {
    use_built_in_font();
    let area = SVGBackend::new(path, size(picture, 1.0)).into_drawing_area();
    render(picture, &area, 1.0)
}

pub(super) fn png(picture: &Picture, path: &Path) -> Result<()> {
    use_built_in_font();
    let area = BitMapBackend::new(path, size(picture, PNG_SCALE)).into_drawing_area();
    render(picture, &area, PNG_SCALE)
}

/// How wide a text is, in pixels.
pub(super) fn width(text: &str, size: f64) -> f64 {
    use_built_in_font();
    (FAMILY, size)
        .into_font()
        .box_size(text)
        .map_or(0.0, |(width, _)| f64::from(width))
}

fn use_built_in_font() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        for (style, bytes) in [
            (FontStyle::Normal, notosans::REGULAR_TTF),
            (FontStyle::Bold, notosans::BOLD_TTF),
        ] {
            // It fails only for what is no font.
            let _ = register_font(FAMILY, style, bytes);
        }
    });
}

fn render<B: DrawingBackend>(picture: &Picture, area: &DrawingArea<B, Shift>, scale: f64) -> Result<()> {
    draw(picture, area, scale).map_err(|error| anyhow!("{error}"))
}

type Drawn<B> = Result<(), plotters::drawing::DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

fn draw<B: DrawingBackend>(picture: &Picture, area: &DrawingArea<B, Shift>, scale: f64) -> Drawn<B> {
    let place = |point: Point| (pixel(point.x * scale), pixel(point.y * scale));
    let stroke = |ink: Ink, width: f64| ShapeStyle {
        color: colour(ink),
        filled: true,
        stroke_width: pixel(width * scale).max(1).unsigned_abs(),
    };
    area.fill(&colour(BACKGROUND))?;
    for shape in &picture.shapes {
        match shape {
            Shape::Rect { from, to, ink } => {
                area.draw(&Rectangle::new([place(*from), place(*to)], colour(*ink).filled()))?;
            }
            Shape::Line {
                from,
                to,
                ink,
                width,
                dashed,
            } => {
                let pieces = if *dashed {
                    dashes(*from, *to)
                } else {
                    vec![(*from, *to)]
                };
                for (from, to) in pieces {
                    area.draw(&PathElement::new([place(from), place(to)], stroke(*ink, *width)))?;
                }
            }
            Shape::Dot { centre, radius, ink } => {
                area.draw(&Circle::new(
                    place(*centre),
                    pixel(radius * scale),
                    colour(*ink).filled(),
                ))?;
            }
            Shape::Text {
                point,
                text,
                ink,
                size,
                bold,
                anchor,
            } => {
                let style = if *bold { FontStyle::Bold } else { FontStyle::Normal };
                let font = (FAMILY, size * scale)
                    .into_font()
                    .style(style)
                    .transform(FontTransform::None);
                let side = match anchor {
                    Anchor::Start => HPos::Left,
                    Anchor::Middle => HPos::Center,
                    Anchor::End => HPos::Right,
                };
                let style = font.color(&colour(*ink)).pos(Pos::new(side, VPos::Center));
                area.draw(&Text::new(text.as_str(), place(*point), style))?;
            }
        }
    }
    area.present()
}

fn dashes(from: Point, to: Point) -> Vec<(Point, Point)> {
    let (dx, dy) = (to.x - from.x, to.y - from.y);
    let length = dx.hypot(dy);
    let along = |distance: f64| Point {
        x: from.x + dx * distance / length,
        y: from.y + dy * distance / length,
    };
    let mut dashes = Vec::new();
    let mut start = 0.0;
    while start < length {
        dashes.push((along(start), along(length.min(start + DASH))));
        start += 2.0 * DASH;
    }
    dashes
}

fn size(picture: &Picture, scale: f64) -> (u32, u32) {
    let side = |length: f64| pixel(length * scale).unsigned_abs();
    (side(picture.width), side(picture.height))
}

#[expect(clippy::cast_possible_truncation, reason = "pictures have a few thousand pixels")]
fn pixel(length: f64) -> i32 {
    length.round() as i32
}

fn colour(ink: Ink) -> RGBAColor {
    let [r, g, b] = ink.rgb;
    RGBColor(r, g, b).mix(ink.opacity)
}

#[cfg(test)]
mod tests {
    use super::super::picture::{TEXT, at};
    use super::*;

    #[test]
    fn text_has_a_width_without_any_font_of_the_system() {
        assert!(width("pagecast", 14.0) > width("page", 14.0));
        assert!(width("page", 14.0) > 20.0);
    }

    #[test]
    fn a_picture_becomes_an_svg_and_a_png() {
        let folder = tempfile::tempdir().unwrap();
        let mut picture = Picture::new(100.0, 50.0);
        picture.text(at(50.0, 25.0), "a < b & c", TEXT, 12.0, Anchor::Middle);
        picture.dashed(at(0.0, 0.0), at(100.0, 50.0), TEXT, 1.0);
        let (as_svg, as_png) = (folder.path().join("a.svg"), folder.path().join("a.png"));
        svg(&picture, &as_svg).unwrap();
        png(&picture, &as_png).unwrap();
        let text = std::fs::read_to_string(as_svg).unwrap();
        assert!(text.contains("<svg width=\"100\" height=\"50\""), "{text}");
        assert!(
            text.contains("a &lt; b &amp; c") && text.trim_end().ends_with("</svg>"),
            "{text}"
        );
        let bytes = std::fs::read(as_png).unwrap();
        assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
        // The header: width and height.
        assert_eq!(
            (&bytes[16..20], &bytes[20..24]),
            (&[0, 0, 0, 200][..], &[0, 0, 0, 100][..])
        );
    }
}
