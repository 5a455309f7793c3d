//! `cargo xtask bench`: what was promised, measured.

mod faults;
mod goal;
mod load;
mod memory;
mod spread;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use serde::Serialize;

use self::faults::Faults;
use self::load::Load;
use self::memory::Memory;
use crate::cargo::{build_sim_vmm_for_release, cargo};

/// Measure what pagecast costs: page faults, memory or the server under load. Without a name: page faults
///
/// Prints a table and writes all that was measured as JSON. The exit code is 0 if all goals were met, 1 if not.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: Option<What>,

    #[command(flatten)]
    faults: Faults,
}

#[derive(Debug, Subcommand)]
enum What {
    Faults(Faults),
    Memory(Memory),
    Load(Load),
}

impl Bench {
    /// Measures, prints a table, writes JSON.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let met = match self.what.as_ref().unwrap_or(&What::Faults(self.faults.clone())) {
            What::Memory(memory) => memory.run()?,
            What::Faults(_) | What::Load(_) if cfg!(debug_assertions) => return run_optimised(),
            What::Faults(faults) => faults.run()?,
            What::Load(load) => load.run()?,
        };
        Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Runs this again, built for speed, with a simulated VMM built for speed beside it.
fn run_optimised() -> Result<ExitCode> {
    build_sim_vmm_for_release()?;
    let mut again = cargo("run");
    again.args(["--quiet", "--release", "--package", "xtask", "--"]);
    let code = again.args(std::env::args_os().skip(1)).status()?.code();
    let code = code.and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Keeps all that was measured.
fn write_json(path: &Path, measured: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(measured).context("failed to write JSON")?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    std::fs::write(path, json + "\n").with_context(|| format!("failed to write {}", path.display()))?;
    println!("all of it in {}", path.display());
    Ok(())
}
