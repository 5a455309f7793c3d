//! Runs the tools that fetch and build things.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Runs a tool to its end, and returns its stdout. A failure has its stderr.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed ({}):\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
