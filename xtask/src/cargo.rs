//! Running cargo, and what it knows about the workspace.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use cargo_metadata::{Metadata, MetadataCommand};

/// The root of the workspace.
pub(crate) fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package xtask is a folder of the workspace")
}

/// The cargo that runs us.
pub(crate) fn cargo_path() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// `cargo SUBCOMMAND`, in the root of the workspace.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(cargo_path());
    command.current_dir(workspace_root()).arg(subcommand);
    command
}

/// The packages of the workspace and where it is built. Fails where `Cargo.lock` is not up to date.
pub(crate) fn metadata() -> Result<Metadata> {
    MetadataCommand::new()
        .current_dir(workspace_root())
        .other_options(["--locked".to_owned()])
        .exec()
        .context("failed to read the workspace")
}
