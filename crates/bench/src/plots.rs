//! Pictures of a report: one for each section and one of all goals, as SVG and PNG. Fonts are built in.

mod bars;
mod figures;
mod lines;
mod picture;
mod render;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use self::picture::Picture;
use crate::report::Report;

/// Draws all pictures that have data into the folder, which must exist. Returns the written files.
///
/// # Errors
///
/// A picture cannot be written.
pub fn draw(report: &Report, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    for (name, picture) in figures::all(report) {
        written.extend(write(&picture, folder, name)?);
    }
    Ok(written)
}

fn write(picture: &Picture, folder: &Path, name: &str) -> Result<[PathBuf; 2]> {
    let (svg, png) = (folder.join(format!("{name}.svg")), folder.join(format!("{name}.png")));
    render::svg(picture, &svg).with_context(|| format!("failed to draw {}", svg.display()))?;
    render::png(picture, &png).with_context(|| format!("failed to draw {}", png.display()))?;
    Ok([svg, png])
}
