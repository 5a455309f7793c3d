//! Pictures of a report.

use std::path::Path;

use anyhow::Result;

use crate::report::Report;

/// Draws
///
/// # Errors
///
/// x
pub fn draw(_report: &Report, _folder: &Path) -> Result<()> {
    Ok(())
}
