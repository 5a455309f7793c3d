//! Simulated VMMs in processes of their own, which run this program once more.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::Result;
use pagecast_testkit::sim_vmm::SimVmm;

/// This program, even if its file has been replaced meanwhile.
const OURSELVES: &str = "/proc/self/exe";

/// The first argument of such a process. It is no command: no help shows it.
const ARGUMENT: &str = "__sim-vmm";

/// Returns `true` in a process that [`spawn`] started. A program that calls `spawn` checks this first in `main`, and
/// then calls [`run`].
pub fn asked_for() -> bool {
    std::env::args_os().nth(1).as_deref() == Some(OsStr::new(ARGUMENT))
}

/// Runs a simulated VMM until its parent closes our stdin.
///
/// # Errors
///
/// A line of stdin is no request.
pub fn run() -> Result<()> {
    pagecast_testkit::sim_vmm::run()
}

/// Starts a simulated VMM.
///
/// # Errors
///
/// It cannot be started.
pub fn spawn() -> Result<SimVmm> {
    let mut command = Command::new(OURSELVES);
    command.arg0("sim-vmm").arg(ARGUMENT);
    SimVmm::spawn_by(command)
}
