//! Forks of the tiny guest in the real Firecracker.

use std::num::NonZeroU8;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pagecast_client::fork::{BackendType, MemBackend};
use pagecast_testkit::firecracker::{self, BlankVmm, GuestRange, MicroVm, Snapshot, SnapshotOptions};

use super::vmm::{Blank, Mismatches, Size, Template, Vmm, WRITE_EVERY};

const TEMPLATE_PATTERN: u8 = 1;

/// A snapshot of the tiny guest.
pub(super) struct Snapshotted {
    snapshot: Snapshot,
}

impl Snapshotted {
    /// Boots the guest, fills its memory and snapshots it into the folder.
    pub(super) fn create(folder: &Path, size: Size) -> Result<Self> {
        let options = SnapshotOptions {
            mem_mib: size.mem_mib,
            fill_mib: size.data_mib,
            pattern: TEMPLATE_PATTERN,
            ..SnapshotOptions::default()
        };
        let snapshot = Snapshot::create(&options, folder).context("failed to snapshot the guest")?;
        Ok(Self { snapshot })
    }
}

impl Template for Snapshotted {
    fn mem_file(&self) -> &Path {
        &self.snapshot.mem_path
    }

    fn working_set(&self) -> Range<u32> {
        mib(self.snapshot.filled)
    }

    fn whole(&self) -> Range<u32> {
        mib(self.snapshot.whole)
    }

    fn start(&self) -> Result<Box<dyn Blank + '_>> {
        Ok(Box::new(Started {
            vmm: BlankVmm::start()?,
            snapshot: &self.snapshot,
        }))
    }
}

struct Started<'a> {
    vmm: BlankVmm,
    snapshot: &'a Snapshot,
}

impl Blank for Started<'_> {
    fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    fn restore(self: Box<Self>, tag: NonZeroU8, memory: &MemBackend) -> Result<(Box<dyn Vmm>, Duration)> {
        let path = memory.backend_path.clone();
        let memory = match memory.backend_type {
            BackendType::File => firecracker::MemBackend::File(path),
            BackendType::Uffd => firecracker::MemBackend::Uffd(path),
        };
        let (microvm, loaded_in) = self.vmm.restore(self.snapshot, &memory)?;
        let fork = Fork {
            microvm,
            pattern: written_pattern(tag),
        };
        Ok((Box::new(fork), loaded_in))
    }
}

/// The pattern that the fork with this tag writes: unlike the template's, zeros, and its neighbours'.
fn written_pattern(tag: NonZeroU8) -> u8 {
    TEMPLATE_PATTERN.saturating_add(tag.get())
}

struct Fork {
    microvm: MicroVm,
    pattern: u8,
}

impl Vmm for Fork {
    fn pid(&self) -> u32 {
        self.microvm.pid()
    }

    fn touch(&mut self, mib: Range<u32>) -> Result<()> {
        self.microvm.touch(range(&mib))?;
        Ok(())
    }

    fn verify(&mut self, mib: Range<u32>) -> Result<Mismatches> {
        let verified = self.microvm.verify(range(&mib))?;
        Ok(Mismatches {
            count: verified.mismatches,
            first: verified.first_bad,
        })
    }

    fn write(&mut self, mib: Range<u32>) -> Result<()> {
        self.microvm.write(range(&mib), WRITE_EVERY, self.pattern)?;
        Ok(())
    }
}

fn range(mib: &Range<u32>) -> GuestRange {
    GuestRange {
        start_mib: mib.start,
        count_mib: mib.end - mib.start,
    }
}

fn mib(range: GuestRange) -> Range<u32> {
    range.start_mib..range.start_mib + range.count_mib
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_fork_writes_what_the_template_holds_nor_zeros() {
        for tag in (1..=u8::MAX).filter_map(NonZeroU8::new) {
            assert!(written_pattern(tag) > TEMPLATE_PATTERN, "{tag}");
        }
    }
}
