//! What real and simulated VMMs have in common here.

use std::num::NonZeroU8;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use pagecast_client::fork::MemBackend;

/// Memory of each guest, in MiB.
pub(crate) const MEM_MIB: u32 = 128;
/// How much of it the template has data for, in MiB: the working set of its forks. The rest is zeros.
pub(crate) const DATA_MIB: u32 = 64;
/// Of so many pages of the working set a fork writes one.
pub(crate) const WRITE_EVERY: u32 = 8;

/// A paused microVM to fork.
pub(crate) trait Template: Sync {
    /// Its memory.
    fn mem_file(&self) -> &Path;

    /// Where its data are, in MiB from the start.
    fn working_set(&self) -> Range<u32>;

    /// All memory that forks can check, in MiB from the start: the working set, and zeros after it.
    fn whole(&self) -> Range<u32>;

    /// Starts a VMM that has no memory yet.
    fn start(&self) -> Result<Box<dyn Blank + '_>>;
}

/// A VMM without a guest, in a process of its own.
pub(crate) trait Blank: Send {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Has it load the template and resume, with memory from there; how long that took. The tag tells apart what forks
    /// write: from 1 on, as far as there are enough.
    fn restore(self: Box<Self>, tag: NonZeroU8, memory: &MemBackend) -> Result<(Box<dyn Vmm>, Duration)>;
}

/// The VMM of a fork, in a process of its own that ends when this is dropped.
pub(crate) trait Vmm: Send {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Has the guest read every word of a range in MiB and compare it with what must be there.
    fn verify(&mut self, mib: Range<u32>) -> Result<Mismatches>;

    /// Has the guest write to one of [`WRITE_EVERY`] pages of a range in MiB.
    fn write(&mut self, mib: Range<u32>) -> Result<()>;
}

/// What was not as it must be.
#[derive(Debug, Default)]
pub(crate) struct Mismatches {
    /// How many words, or pages where VMMs are simulated.
    pub(crate) count: u64,
    /// The first: where, what it must be, what it was.
    pub(crate) first: Option<String>,
}

impl Mismatches {
    /// Adds those that were found later.
    pub(crate) fn add(&mut self, later: Self) {
        self.count += later.count;
        self.first = self.first.take().or(later.first);
    }
}
