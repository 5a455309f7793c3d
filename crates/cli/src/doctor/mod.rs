//! `pagecast doctor`: checks whether this host can serve forks.
//!
//! Each probe looks at one thing and makes one [`Finding`] of it. Looking and judging are separate functions, so that
//! every outcome can be tested on any machine.

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

/// Check whether this host can serve forks, and print how to fix what is missing.
///
/// Run it as the user of the VMMs, since they create userfaultfds and open /dev/kvm. Changes nothing on the host.
#[derive(Args)]
#[command(after_help = "\
Each line is one of:
  ok    no problem
  warn  works, but something optional is missing or weaker than it could be
  fail  forks cannot be served until this is fixed

A line that is not ok has its fix on the line below.

Exit codes:
  0  no check failed; there may be warnings
  1  the result could not be printed
  2  wrong usage
  4  a check failed")]
pub(crate) struct Doctor {
    /// Print an array of {check, status, found, fix?} in JSON.
    #[arg(long)]
    json: bool,

    /// The run dir of the daemon.
    #[arg(long, value_name = "DIR", default_value = "/run/pagecast")]
    run_dir: PathBuf,

    /// The Firecracker binary to check.
    #[arg(long, value_name = "PATH", default_value = "firecracker")]
    firecracker: PathBuf,
}

/// Exit code if a check failed.
const UNFIT: u8 = 4;

impl Doctor {
    /// Checks the host and prints the findings.
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
