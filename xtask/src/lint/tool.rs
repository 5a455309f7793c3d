//! Tools whose output matters only if they fail.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Runs the tool to its end. A failure has all its output.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .env("CARGO_TERM_COLOR", colour())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{}{}{} ({})",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        words(command),
        output.status
    );
    Ok(())
}

/// The colour setting for such a tool, whose output is no terminal: the same as ours.
pub(super) fn colour() -> &'static str {
    if console::colors_enabled() { "always" } else { "never" }
}

fn words(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
