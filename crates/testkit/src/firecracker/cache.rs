//! `target/pagecast`: files that are fetched or built once, and then used by many test processes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Returns the folder, and creates it if it is missing.
pub(crate) fn folder() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    // A relative CARGO_TARGET_DIR is relative to where cargo ran, which for this workspace is its root.
    let target = workspace.join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()));
    let folder = target.join("pagecast");
    fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    folder
        .canonicalize()
        .with_context(|| format!("failed to resolve {}", folder.display()))
}

/// Locks this name against other processes and threads, until the file is dropped.
pub(crate) fn lock(name: &str) -> Result<File> {
    let path = folder()?.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    file.lock()
        .with_context(|| format!("failed to lock {}", path.display()))?;
    Ok(file)
}
