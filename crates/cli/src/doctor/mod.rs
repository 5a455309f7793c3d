//! `pagecast doctor`: can this host do it, and what is missing.
//!
//! Each probe looks at one thing and makes one [`Finding`] of it. What it looks at and what it makes of that are apart,
//! so that every outcome can be tested on any machine.

mod finding;

#[cfg(target_os = "linux")]
mod cgroup;
#[cfg(target_os = "linux")]
mod device;
#[cfg(target_os = "linux")]
mod firecracker;
#[cfg(target_os = "linux")]
mod host;
#[cfg(target_os = "linux")]
mod kernel;
#[cfg(target_os = "linux")]
mod lease;
#[cfg(target_os = "linux")]
mod limit;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod run_dir;
#[cfg(target_os = "linux")]
mod userfaultfd;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use self::finding::{Finding, Status, for_people};
use pagecast_command::Output;

/// Check whether this host can serve forks, and say what is missing.
///
/// Run it as the user that the VMMs run as: it is they who create userfaultfds and open /dev/kvm. Nothing is changed on
/// the host.
#[derive(Args)]
#[command(after_help = "\
Each line is one of:
  ok    as it should be
  warn  works, but something optional is missing or weaker than it could be
  fail  forks cannot be served like this

Below each line that is not ok stands what to do about it.

Exit codes:
  0  nothing failed; there may be warnings
  1  the result could not be printed
  2  wrong usage
  4  something failed")]
pub(crate) struct Doctor {
    /// Print an array of {check, status, found, fix?} in JSON.
    #[arg(long)]
    json: bool,

    /// The folder where the daemon will keep its state.
    #[arg(long, value_name = "DIR", default_value = "/run/pagecast")]
    run_dir: PathBuf,

    /// The Firecracker to ask for its version.
    #[arg(long, value_name = "PATH", default_value = "firecracker")]
    firecracker: PathBuf,
}

/// Something failed.
const UNFIT: u8 = 4;

impl Doctor {
    /// Examines the host and prints what was found.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let findings = self.examine();
        let output = Output::stdout();
        if self.json {
            output.print_json(&findings)?;
        } else {
            output.print(&for_people(&findings, output))?;
        }
        let failed = findings.iter().any(|finding| finding.status() == Status::Fail);
        Ok(if failed {
            ExitCode::from(UNFIT)
        } else {
            ExitCode::SUCCESS
        })
    }

    #[cfg(target_os = "linux")]
    fn examine(&self) -> Vec<Finding> {
        let host = host::Host::this();
        let mut findings = Vec::from(kernel::probe(&host));
        findings.extend(userfaultfd::probe(&host));
        findings.push(device::probe_kvm(&host));
        findings.push(firecracker::probe(&self.firecracker));
        findings.extend(memory::probe(&host));
        findings.extend(cgroup::probe());
        findings.extend(limit::probe(&host));
        findings.push(device::probe_fuse(&host));
        findings.extend(lease::probe(&host));
        findings.push(run_dir::probe(&self.run_dir));
        findings
    }

    #[cfg(not(target_os = "linux"))]
    #[expect(clippy::unused_self, reason = "there is nothing to examine")]
    fn examine(&self) -> Vec<Finding> {
        vec![Finding::fail(
            "kernel",
            format!("this is {}", std::env::consts::OS),
            "userfaultfd and Firecracker need Linux",
        )]
    }
}
