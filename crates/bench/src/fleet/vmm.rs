//! Traits of real and simulated VMMs.

use std::num::NonZeroU8;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use pagecast_client::fork::MemBackend;

/// The size of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Memory of each guest, in MiB.
    pub mem_mib: u32,
    /// MiB of it that the template has data for: the working set of its forks. The rest is zeros.
    pub data_mib: u32,
}

/// A fork writes to one of this number of pages of the working set.
pub const WRITE_EVERY: u32 = 8;

/// A paused microVM to fork.
pub trait Template: Sync {
    /// Path of its memory file.
    fn mem_file(&self) -> &Path;

    /// The range of its data, in MiB from the start.
    fn working_set(&self) -> Range<u32>;

    /// The memory that forks can check, in MiB from the start: the working set, and zeros after it.
    fn whole(&self) -> Range<u32>;

    /// Starts a VMM without memory.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    fn start(&self) -> Result<Box<dyn Blank + '_>>;
}

/// A VMM without a guest, in a process of its own.
pub trait Blank: Send {
    /// Its process ID.
    fn pid(&self) -> u32;

    /// Loads the template with memory from this backend, and resumes. Returns the time. Forks with different tags write
    /// different patterns; tags start at 1.
    ///
    /// # Errors
    ///
    /// It cannot be restored.
    fn restore(self: Box<Self>, tag: NonZeroU8, memory: &MemBackend) -> Result<(Box<dyn Vmm>, Duration)>;
}

/// The VMM of a fork, in a process of its own that ends when this is dropped.
pub trait Vmm: Send {
    /// Its process ID.
    fn pid(&self) -> u32;

    /// Has the guest read a word of each page of a range in MiB.
    ///
    /// # Errors
    ///
    /// It has ended, or does not answer.
    fn touch(&mut self, mib: Range<u32>) -> Result<()>;

    /// Has the guest read every word of a range in MiB and compare it with what must be there.
    ///
    /// # Errors
    ///
    /// It has ended, or does not answer.
    fn verify(&mut self, mib: Range<u32>) -> Result<Mismatches>;

    /// Has the guest write to one of [`WRITE_EVERY`] pages of a range in MiB.
    ///
    /// # Errors
    ///
    /// It has ended, or does not answer.
    fn write(&mut self, mib: Range<u32>) -> Result<()>;
}

/// Wrong content of a guest's memory.
#[derive(Debug, Default)]
pub struct Mismatches {
    /// Number of wrong words, or of wrong pages if VMMs are simulated.
    pub count: u64,
    /// The first: its address, its expected and its actual content.
    pub first: Option<String>,
}

impl Mismatches {
    /// Adds mismatches that were found later.
    pub fn add(&mut self, later: Self) {
        self.count += later.count;
        self.first = self.first.take().or(later.first);
    }
}
