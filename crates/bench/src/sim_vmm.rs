//! Simulated VMMs in processes of their own, without a program of their own: `pagecast` itself is run once more.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use pagecast_testkit::sim_vmm::SimVmm;

/// The first argument of a pagecast that is to be one. It is no command, so no help, completion or manual names it.
const ARGUMENT: &str = "__sim-vmm";

/// Whether this process is to be a simulated VMM: whoever calls this in `main` calls [`run`] where it is.
pub fn asked_for() -> bool {
    std::env::args_os().nth(1).as_deref() == Some(OsStr::new(ARGUMENT))
}

/// Is one, until its parent closes our stdin.
///
/// # Errors
///
/// What comes on stdin is no request.
pub fn run() -> Result<()> {
    pagecast_testkit::sim_vmm::run()
}

/// Starts one; `pagecast` is a program that does as [`asked_for`] says.
///
/// # Errors
///
/// It cannot be started.
pub fn spawn(pagecast: &Path) -> Result<SimVmm> {
    let mut command = Command::new(pagecast);
    command.arg0("pagecast").arg(ARGUMENT);
    SimVmm::spawn_by(command)
}
