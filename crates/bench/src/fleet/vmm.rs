//! What real and simulated VMMs have in common here.

use std::num::NonZeroU8;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use pagecast_client::fork::MemBackend;

/// How large a template is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Memory of each guest, in MiB.
    pub mem_mib: u32,
    /// How much of it the template has data for, in MiB: the working set of its forks. The rest is zeros.
    pub data_mib: u32,
}

/// Of so many pages of the working set a fork writes one.
pub const WRITE_EVERY: u32 = 8;

/// A paused microVM to fork.
pub trait Template: Sync {
    /// Its memory.
    fn mem_file(&self) -> &Path;

    /// Where its data are, in MiB from the start.
    fn working_set(&self) -> Range<u32>;

    /// All memory that forks can check, in MiB from the start: the working set, and zeros after it.
    fn whole(&self) -> Range<u32>;

    /// Starts a VMM that has no memory yet.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    fn start(&self) -> Result<Box<dyn Blank + '_>>;
}

/// A VMM without a guest, in a process of its own.
pub trait Blank: Send {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Has it load the template and resume, with memory from there; how long that took. The tag tells apart what forks
    /// write: from 1 on, as far as there are enough.
    ///
    /// # Errors
    ///
    /// It cannot be restored.
    fn restore(self: Box<Self>, tag: NonZeroU8, memory: &MemBackend) -> Result<(Box<dyn Vmm>, Duration)>;
}

/// The VMM of a fork, in a process of its own that ends when this is dropped.
pub trait Vmm: Send {
    /// Its process id.
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

/// What was not as it must be.
#[derive(Debug, Default)]
pub struct Mismatches {
    /// How many words, or pages where VMMs are simulated.
    pub count: u64,
    /// The first: where, what it must be, what it was.
    pub first: Option<String>,
}

impl Mismatches {
    /// Adds those that were found later.
    pub fn add(&mut self, later: Self) {
        self.count += later.count;
        self.first = self.first.take().or(later.first);
    }
}
