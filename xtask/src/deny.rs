//! `cargo xtask deny`: licences, versions and sources of dependencies, and advisories about them.

use std::process::ExitCode;

use anyhow::Result;

use crate::cargo_tool::{CargoTool, status};

const DENY: CargoTool = CargoTool {
    name: "deny",
    version: "0.20.2",
};

/// Check licences, versions and sources of dependencies with cargo-deny, which is installed if it is missing
///
/// Also checks security advisories, if their database can be fetched from GitHub. The rules are in deny.toml, with a
/// reason for each exception.
#[derive(Debug, clap::Args)]
pub(crate) struct Deny {}

impl Deny {
    #[expect(
        clippy::unused_self,
        reason = "a task is run by its arguments, and this one has none"
    )]
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let mut passed = deny(&["check", "licenses", "bans", "sources"])?;
        if deny(&["fetch", "db"])? {
            passed &= deny(&["check", "advisories"])?;
        } else {
            eprintln!("advisories were NOT checked: their database could not be fetched");
        }
        Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Runs cargo-deny. Returns `true` if it succeeds.
fn deny(arguments: &[&str]) -> Result<bool> {
    let mut command = DENY.command()?;
    command.args(["--locked", "--workspace"]).args(arguments);
    Ok(status(&mut command)?.success())
}
