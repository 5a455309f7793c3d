//! `cargo xtask deny`: licences, sources and known faults of dependencies.

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::cargo_tool::{CargoTool, status};

const CARGO_DENY: CargoTool = CargoTool {
    name: "deny",
    version: "0.18.9",
};

/// Check licences, sources, duplicates and advisories of all dependencies, with cargo-deny, which is installed if it is missing
///
/// The rules, and a reason for each exception, are in deny.toml.
#[derive(Debug, clap::Args)]
pub(crate) struct Deny {
    /// Leave out the advisories, which are fetched from the network
    #[arg(long)]
    offline: bool,
}

impl Deny {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let mut deny = CARGO_DENY.command()?;
        deny.args(["--all-features", "check", "licenses", "bans", "sources"]);
        if !self.offline {
            deny.arg("advisories");
        }
        ensure!(status(&mut deny)?.success(), "a dependency breaks a rule of deny.toml");
        Ok(ExitCode::SUCCESS)
    }
}
