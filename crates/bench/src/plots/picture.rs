//! A picture as a list of shapes, so that all file formats look the same.

/// A position in pixels from the upper left, before a PNG scales it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
}

pub(super) fn at(x: f64, y: f64) -> Point {
    Point { x, y }
}

/// A colour with its opacity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ink {
    pub(super) rgb: [u8; 3],
    pub(super) opacity: f64,
}

impl Ink {
    const fn of(r: u8, g: u8, b: u8) -> Self {
        Self {
            rgb: [r, g, b],
            opacity: 1.0,
        }
    }

    pub(super) fn light(self) -> Self {
        Self { opacity: 0.22, ..self }
    }

    pub(super) fn light_more(self) -> Self {
        Self { opacity: 0.07, ..self }
    }
}

pub(super) const BACKGROUND: Ink = Ink::of(255, 255, 255);
pub(super) const TEXT: Ink = Ink::of(36, 41, 47);
pub(super) const FAINT_TEXT: Ink = Ink::of(101, 109, 118);
pub(super) const GRID: Ink = Ink::of(225, 228, 232);
/// The colour of floors.
pub(super) const FLOOR: Ink = Ink::of(139, 148, 158);
/// The colour of rivals.
pub(super) const RIVAL: Ink = Ink::of(212, 145, 47);
/// The colour of pagecast's `uffd`.
pub(super) const OURS: Ink = Ink::of(31, 111, 235);
/// The colour of pagecast's `uffd` with a working set.
pub(super) const OURS_AHEAD: Ink = Ink::of(130, 80, 223);
/// The colour of pagecast's `file`.
pub(super) const OURS_FILE: Ink = Ink::of(26, 137, 99);
pub(super) const GOAL: Ink = Ink::of(207, 34, 46);
pub(super) const MET: Ink = Ink::of(26, 137, 99);
pub(super) const UNKNOWN: Ink = Ink::of(191, 135, 0);

/// The position of a text relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    /// The text begins at the point.
    Start,
    Middle,
    /// The text ends at the point.
    End,
}

#[derive(Clone, Debug)]
pub(super) enum Shape {
    Rect {
        from: Point,
        to: Point,
        ink: Ink,
    },
    Line {
        from: Point,
        to: Point,
        ink: Ink,
        width: f64,
        dashed: bool,
    },
    Dot {
        centre: Point,
        radius: f64,
        ink: Ink,
    },
    /// The point is at half the height of the text.
    Text {
        point: Point,
        text: String,
        ink: Ink,
        size: f64,
        bold: bool,
        anchor: Anchor,
    },
}

/// Shapes, each over the earlier ones.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) shapes: Vec<Shape>,
}

impl Picture {
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self {
            width,
            height,
            shapes: Vec::new(),
        }
    }

    pub(super) fn rect(&mut self, from: Point, to: Point, ink: Ink) {
        self.shapes.push(Shape::Rect { from, to, ink });
    }

    pub(super) fn line(&mut self, from: Point, to: Point, ink: Ink, width: f64) {
        self.shapes.push(Shape::Line {
            from,
            to,
            ink,
            width,
            dashed: false,
        });
    }

    pub(super) fn dashed(&mut self, from: Point, to: Point, ink: Ink, width: f64) {
        self.shapes.push(Shape::Line {
            from,
            to,
            ink,
            width,
            dashed: true,
        });
    }

    pub(super) fn dot(&mut self, centre: Point, radius: f64, ink: Ink) {
        self.shapes.push(Shape::Dot { centre, radius, ink });
    }

    pub(super) fn text(&mut self, point: Point, text: impl Into<String>, ink: Ink, size: f64, anchor: Anchor) {
        self.shapes.push(Shape::Text {
            point,
            text: text.into(),
            ink,
            size,
            bold: false,
            anchor,
        });
    }

    pub(super) fn bold(&mut self, point: Point, text: impl Into<String>, ink: Ink, size: f64, anchor: Anchor) {
        self.shapes.push(Shape::Text {
            point,
            text: text.into(),
            ink,
            size,
            bold: true,
            anchor,
        });
    }
}
