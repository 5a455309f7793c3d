//! Targets of the Rust toolchain.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::tool;

/// Adds the target to the toolchain if it is missing.
pub(super) fn ensure_installed(target: &str) -> Result<()> {
    let output = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .output()
        .context("failed to start rustc")?;
    if Path::new(String::from_utf8_lossy(&output.stdout).trim_end()).is_dir() {
        return Ok(());
    }
    tool::run(Command::new("rustup").args(["target", "add", target]))
        .with_context(|| format!("the Rust target {target} is missing: install it for this toolchain"))
}
