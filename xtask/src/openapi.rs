//! `cargo xtask openapi`: the `OpenAPI` document of the control API, generated from its code.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};

use crate::cargo::workspace_root;

/// Path of the committed document.
const DOCUMENT: &str = "docs/openapi.json";

/// Write the `OpenAPI` document of the control API
#[derive(Debug, clap::Args)]
pub(crate) struct OpenApi {}

impl OpenApi {
    #[expect(
        clippy::unused_self,
        reason = "a task is run by its arguments, and this one has none"
    )]
    pub(crate) fn run(&self) -> Result<ExitCode> {
        fs::write(workspace_root().join(DOCUMENT), pagecast_daemon::openapi())
            .with_context(|| format!("failed to write {DOCUMENT}"))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Checks that the committed document matches the code.
pub(crate) fn check_committed() -> Result<()> {
    let committed = fs::read_to_string(workspace_root().join(DOCUMENT))
        .with_context(|| format!("failed to read {DOCUMENT}: run `cargo xtask openapi`"))?;
    ensure!(
        committed == pagecast_daemon::openapi(),
        "{DOCUMENT} does not match the code: run `cargo xtask openapi`"
    );
    Ok(())
}
