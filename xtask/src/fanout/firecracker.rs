//! Forks of the tiny guest in the real Firecracker.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pagecast_testkit::firecracker::{GuestRange, MemBackend, MicroVm, Snapshot, SnapshotOptions};

use super::vmm::{self, DATA_MIB, MEM_MIB, Mismatches, Vmm, WRITE_EVERY};

const TEMPLATE_PATTERN: u8 = 1;

/// A snapshot of the tiny guest.
pub(super) struct Template {
    snapshot: Snapshot,
}

impl Template {
    /// Boots the guest, fills its memory and snapshots it into the folder.
    pub(super) fn create(folder: &Path) -> Result<Self> {
        let options = SnapshotOptions {
            mem_mib: MEM_MIB,
            fill_mib: DATA_MIB,
            pattern: TEMPLATE_PATTERN,
            ..SnapshotOptions::default()
        };
        let snapshot = Snapshot::create(&options, folder).context("failed to snapshot the guest")?;
        Ok(Self { snapshot })
    }
}

impl fmt::Display for Template {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{MEM_MIB} MiB, of which {DATA_MIB} MiB data")
    }
}

impl vmm::Template for Template {
    fn mem_file(&self) -> &Path {
        &self.snapshot.mem_path
    }

    fn checked_mib(&self) -> Range<u32> {
        let whole = self.snapshot.whole;
        whole.start_mib..whole.start_mib + whole.count_mib
    }

    fn restore(&self, number: u32, socket: &Path) -> Result<(Box<dyn Vmm>, Duration)> {
        let backend = MemBackend::Uffd(socket.to_owned());
        let (microvm, loaded_in) = MicroVm::restore(&self.snapshot, &backend)?;
        let fork = Fork {
            microvm,
            pattern: written_pattern(number),
        };
        Ok((Box::new(fork), loaded_in))
    }
}

/// What the fork with this number writes: not what the template holds, nor zeros, nor what its neighbours write.
fn written_pattern(number: u32) -> u8 {
    let first = u32::from(TEMPLATE_PATTERN) + 1;
    let count = u32::from(u8::MAX) - first + 1;
    u8::try_from(first + number % count).expect("it is taken modulo what is left of a byte")
}

struct Fork {
    microvm: MicroVm,
    pattern: u8,
}

impl Vmm for Fork {
    fn pid(&self) -> u32 {
        self.microvm.pid()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_fork_writes_what_the_template_holds_nor_zeros() {
        for number in 1..1000 {
            assert!(written_pattern(number) > TEMPLATE_PATTERN, "{number}");
            assert_ne!(written_pattern(number), written_pattern(number + 1), "{number}");
        }
    }
}
