//! A harness for the real Firecracker, with a tiny guest of our own.
//!
//! ```no_run
//! use pagecast_testkit::firecracker::{MemBackend, MicroVm, Snapshot, SnapshotOptions, kvm};
//!
//! # fn main() -> anyhow::Result<()> {
//! if kvm()?.skips() {
//!     return Ok(());
//! }
//! let folder = tempfile::tempdir()?;
//! let snapshot = Snapshot::create(&SnapshotOptions::default(), folder.path())?;
//! let (mut fork, _loaded_in) = MicroVm::restore(&snapshot, &MemBackend::File(snapshot.mem_path.clone()))?;
//! assert_eq!(fork.verify(snapshot.filled)?.mismatches, 0);
//! # Ok(())
//! # }
//! ```
//!
//! It fetches or builds all it needs, and keeps it in `target/pagecast`: the Firecracker binary ([`binary`]) and the
//! guest, built from `crates/testkit/guest`, whose documentation describes its commands and design. Many test processes
//! may do this at once.

mod binary;
mod cache;
mod console;
mod create_snapshot;
mod guest;
mod jail;
mod kvm;
mod microvm;
mod patterns;
mod range;
mod snapshot;
mod tool;
mod vmm;

pub use binary::{binary, jailer};
pub use console::{Inflated, Touched, Verified, Written};
pub use guest::{build_guest, guest_command, has_guest_source};
pub use jail::Jail;
pub use kvm::{Kvm, kvm};
pub use microvm::{BlankVmm, MicroVm};
pub use range::GuestRange;
pub use snapshot::{Drive, MemBackend, Snapshot, SnapshotOptions};
