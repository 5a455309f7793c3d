//! Simulated VMMs in processes of their own, without a program of their own: this very program is run once more.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::Result;
use pagecast_testkit::sim_vmm::SimVmm;

/// This very program, also where its file has been replaced since it was started.
const OURSELVES: &str = "/proc/self/exe";

/// The first argument of a process that is to be one. It is no command, so no help names it.
const ARGUMENT: &str = "__sim-vmm";

/// Returns `true` in a process that [`spawn`] started. A program that calls `spawn` checks this first in `main`, and calls
/// [`run`] if it is so.
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

/// Starts one.
///
/// # Errors
///
/// It cannot be started.
pub fn spawn() -> Result<SimVmm> {
    let mut command = Command::new(OURSELVES);
    command.arg0("sim-vmm").arg(ARGUMENT);
    SimVmm::spawn_by(command)
}
