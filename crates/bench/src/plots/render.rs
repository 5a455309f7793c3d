//! Pictures as files.

use std::path::Path;
use std::sync::Once;

use ab_glyph::{Font as _, FontRef, Glyph, PxScaleFont, ScaleFont as _};
use anyhow::{Result, anyhow};
use plotters::backend::{BitMapBackend, SVGBackend};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, FontDesc, FontFamily, FontStyle, RGBAColor, RGBColor, ShapeStyle, register_font};

use super::picture::{Anchor, BACKGROUND, Ink, Picture, Point, Shape};

/// Pixels of a PNG for one pixel of the picture: screens are dense.
const PNG_SCALE: f64 = 2.0;
/// The font family in an SVG. Viewers use a font of that kind, about as wide as the built-in one.
const FAMILY: &str = "sans-serif";
/// plotters takes the size of a font as the height of its lines, and an SVG as that of its letter m.
const LINE_HEIGHT: f64 = 1.24;
/// Distance of the baseline from the middle of a text, as a part of its size: half the height of an x.
const HALF_X: f64 = 0.27;
/// Length of a dash, and of the gap after it, in pixels.
const DASH: f64 = 5.0;

pub(super) fn svg(picture: &Picture, path: &Path) -> Result<()> {
    // plotters needs a font even if it only writes its name.
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // It fails only for data that is no font.
        let _ = register_font(FAMILY, FontStyle::Normal, notosans::REGULAR_TTF);
    });
    let area = SVGBackend::new(path, size(picture, 1.0)).into_drawing_area();
    render(picture, &area, 1.0, named_text)
}

pub(super) fn png(picture: &Picture, path: &Path) -> Result<()> {
    let area = BitMapBackend::new(path, size(picture, PNG_SCALE)).into_drawing_area();
    render(picture, &area, PNG_SCALE, drawn_text)
}

/// Returns the width of a text in pixels.
pub(super) fn width(text: &str, size: f64) -> f64 {
    let font = BuiltIn::of(false, size);
    f64::from(font.glyphs(text).1)
}

/// Returns the built-in font in this size.
struct BuiltIn {
    font: PxScaleFont<FontRef<'static>>,
}

impl BuiltIn {
    fn of(bold: bool, size: f64) -> Self {
        let bytes = if bold {
            notosans::BOLD_TTF
        } else {
            notosans::REGULAR_TTF
        };
        let font = FontRef::try_from_slice(bytes).expect("what is built in is a font");
        let height = font.height_unscaled() / font.units_per_em().unwrap_or(1000.0);
        #[expect(clippy::cast_possible_truncation, reason = "a size is a small number")]
        let scale = size as f32 * height;
        Self {
            font: font.into_scaled(scale),
        }
    }

    /// Returns the letters of a text, each with its offset, and the total width.
    fn glyphs(&self, text: &str) -> (Vec<(Glyph, f32)>, f32) {
        let mut glyphs: Vec<(Glyph, f32)> = Vec::new();
        let mut along = 0.0;
        for letter in text.chars() {
            let glyph = self.font.scaled_glyph(letter);
            if let Some((last, _)) = glyphs.last() {
                along += self.font.kern(last.id, glyph.id);
            }
            let advance = self.font.h_advance(glyph.id);
            glyphs.push((glyph, along));
            along += advance;
        }
        (glyphs, along)
    }
}

/// A text to be drawn, in pixels of the file.
struct Words<'a> {
    point: (f64, f64),
    text: &'a str,
    ink: Ink,
    size: f64,
    bold: bool,
    anchor: Anchor,
}

/// Names the font and the position.
fn named_text<B: DrawingBackend>(area: &DrawingArea<B, Shift>, words: &Words<'_>) -> Drawn<B> {
    let style = if words.bold { FontStyle::Bold } else { FontStyle::Normal };
    let font = FontDesc::new(FontFamily::Name(FAMILY), words.size * LINE_HEIGHT, style);
    let side = match words.anchor {
        Anchor::Start => HPos::Left,
        Anchor::Middle => HPos::Center,
        Anchor::End => HPos::Right,
    };
    let style = font.color(&colour(words.ink)).pos(Pos::new(side, VPos::Center));
    let place = (pixel(words.point.0), pixel(words.point.1));
    area.draw(&Text::new(words.text, place, style))
}

/// Draws letter by letter, since plotters sets letters without the space that belongs before each.
fn drawn_text<B: DrawingBackend>(area: &DrawingArea<B, Shift>, words: &Words<'_>) -> Drawn<B> {
    let built_in = BuiltIn::of(words.bold, words.size);
    let (glyphs, width) = built_in.glyphs(words.text);
    let before = match words.anchor {
        Anchor::Start => 0.0,
        Anchor::Middle => f64::from(width) / 2.0,
        Anchor::End => f64::from(width),
    };
    let (left, baseline) = (words.point.0 - before, words.point.1 + words.size * HALF_X);
    for (mut glyph, along) in glyphs {
        #[expect(clippy::cast_possible_truncation, reason = "pictures have a few thousand pixels")]
        let position = ab_glyph::point((left + f64::from(along)) as f32, baseline as f32);
        glyph.position = position;
        let Some(outline) = built_in.font.outline_glyph(glyph) else {
            continue;
        };
        let bounds = outline.px_bounds();
        let (x0, y0) = (pixel(bounds.min.x.into()), pixel(bounds.min.y.into()));
        let mut dots = Vec::new();
        outline.draw(|x, y, coverage| dots.push((x, y, coverage)));
        for (x, y, coverage) in dots.into_iter().filter(|dot| dot.2 > 0.0) {
            let ink = Ink {
                opacity: words.ink.opacity * f64::from(coverage.min(1.0)),
                ..words.ink
            };
            let place = (x0 + x.cast_signed(), y0 + y.cast_signed());
            area.draw_pixel(place, &colour(ink))?;
        }
    }
    Ok(())
}

type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// The output of a backend.
type Write<B> = fn(&DrawingArea<B, Shift>, &Words<'_>) -> Drawn<B>;

fn render<B: DrawingBackend>(
    picture: &Picture,
    area: &DrawingArea<B, Shift>,
    scale: f64,
    write: Write<B>,
) -> Result<()> {
    draw(picture, area, scale, write).map_err(|error| anyhow!("{error}"))
}

fn draw<B: DrawingBackend>(picture: &Picture, area: &DrawingArea<B, Shift>, scale: f64, write: Write<B>) -> Drawn<B> {
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
            } => write(
                area,
                &Words {
                    point: (point.x * scale, point.y * scale),
                    text,
                    ink: *ink,
                    size: size * scale,
                    bold: *bold,
                    anchor: *anchor,
                },
            )?,
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
