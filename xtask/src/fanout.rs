//! Many forks of one template at once, each checking every byte that it reads: in the real Firecracker, or simulated.

mod firecracker;
mod scenario;
mod simulated;
mod vmm;

use std::path::Path;

use anyhow::Result;
use pagecast_testkit::firecracker::{Kvm, binary, build_guest};

pub(crate) use self::scenario::{Played, PlayedFork, Scenario};
pub(crate) use self::vmm::{DATA_MIB, MEM_MIB, Template, WRITE_EVERY};
use crate::cargo::build_sim_vmm;
use crate::progress::Progress;

/// A template in `folder`, of what can run here.
pub(crate) fn create_template(kvm: &Kvm, folder: &Path) -> Result<Box<dyn Template>> {
    match kvm {
        Kvm::Usable => boot_and_snapshot(folder),
        Kvm::Missing(_) => simulate(folder),
    }
}

/// A template of real Firecracker.
fn boot_and_snapshot(folder: &Path) -> Result<Box<dyn Template>> {
    let progress = Progress::start("getting Firecracker and the guest");
    build_guest()?;
    let binary = binary()?;
    progress.done(&binary.display().to_string());

    let progress = Progress::start("booting and snapshotting the guest");
    let template = firecracker::Snapshotted::create(folder)?;
    progress.done(&size());
    Ok(Box::new(template))
}

/// A template of the same size for simulated VMMs.
fn simulate(folder: &Path) -> Result<Box<dyn Template>> {
    let progress = Progress::start("building the simulated VMM and its template");
    build_sim_vmm()?;
    let template = simulated::Simulated::create(folder)?;
    progress.done(&size());
    Ok(Box::new(template))
}

fn size() -> String {
    format!("{MEM_MIB} MiB, of which {DATA_MIB} MiB data")
}
