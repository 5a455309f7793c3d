//! What real and simulated VMMs have in common here.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

/// Memory of each guest, in MiB.
pub(super) const MEM_MIB: u32 = 128;
/// How much of it the template has data for, in MiB; the rest is zeros.
pub(super) const DATA_MIB: u32 = 64;
/// Of so many pages a fork writes one.
pub(super) const WRITE_EVERY: u32 = 8;

/// A paused microVM to fork.
pub(super) trait Template: Sync {
    /// Its memory.
    fn mem_file(&self) -> &Path;

    /// Which part of its memory forks check, in MiB from the start.
    fn checked_mib(&self) -> Range<u32>;

    /// Starts a VMM, has it load the template and resume with the page server at `socket`; how long it took to load and
    /// resume. The number, from 1 on, tells forks apart by what they write.
    fn restore(&self, number: u32, socket: &Path) -> Result<(Box<dyn Vmm>, Duration)>;
}

/// The VMM of a fork, in a process of its own that ends when this is dropped.
pub(super) trait Vmm: Send {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Has the guest read every word of a range in MiB and compare it with what must be there.
    fn verify(&mut self, mib: Range<u32>) -> Result<Mismatches>;

    /// Has the guest write to one of [`WRITE_EVERY`] pages of a range in MiB.
    fn write(&mut self, mib: Range<u32>) -> Result<()>;
}

/// What was not as it must be.
#[derive(Debug, Default)]
pub(super) struct Mismatches {
    /// How many words, or pages where VMMs are simulated.
    pub(super) count: u64,
    /// The first: where, what it must be, what it was.
    pub(super) first: Option<String>,
}

impl Mismatches {
    /// Adds those that were found later.
    pub(super) fn add(&mut self, later: Self) {
        self.count += later.count;
        self.first = self.first.take().or(later.first);
    }
}
