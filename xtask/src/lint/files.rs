//! The files of the workspace.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use proc_macro2::TokenStream;

use crate::cargo::workspace_root;

/// Returns all files with this extension in the folder and its sub-folders, without build output.
pub(super) fn with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = folder
        .read_dir()
        .with_context(|| format!("failed to list {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("failed to list {}", folder.display()))?;
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if path.is_dir() && !hidden && entry.file_name() != "target" {
            found.extend(with_extension(&path, extension)?);
        } else if path.extension() == Some(OsStr::new(extension)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Returns a line `FILE:LINE: problem` for each line that `find` returns for a Rust file, except those in `places`.
pub(super) fn problems_in_rust(
    places: &[&str],
    problem: &str,
    find: impl Fn(TokenStream) -> Vec<usize>,
) -> Result<Vec<String>> {
    let root = workspace_root();
    let mut found = Vec::new();
    for path in with_extension(root, "rs")? {
        let name = path.strip_prefix(root).expect("it was found there");
        if places.iter().any(|place| name.starts_with(place)) {
            continue;
        }
        let name = name.display();
        let source = fs::read_to_string(&path).with_context(|| format!("failed to read {name}"))?;
        let lines = find(tokens(&source).with_context(|| format!("failed to read {name}"))?);
        found.extend(lines.iter().map(|line| format!("{name}:{line}: {problem}")));
    }
    Ok(found)
}

/// The tokens of a Rust file.
pub(super) fn tokens(source: &str) -> Result<TokenStream> {
    source.parse().map_err(|error| anyhow!("not Rust: {error}"))
}
