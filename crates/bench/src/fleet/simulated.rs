//! Forks in simulated VMMs, for machines without KVM.

use std::num::{NonZeroU8, NonZeroU32};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pagecast_client::fork::{BackendType, MemBackend};
use pagecast_testkit::sim_vmm::{Connect, MapFile, Pages, Read, SimVmm, Visit, Write};
use pagecast_testkit::template_file::{LAYOUT_PAGE, Layout, TemplateFile, TemplateModel};

use super::vmm::{Blank, Mismatches, Size, Template, Vmm, WRITE_EVERY};
use crate::sim_vmm;

const MIB: u64 = 1 << 20;
const PAGES_PER_MIB: u64 = MIB / LAYOUT_PAGE;

/// A mem-file like that of the tiny guest.
pub(super) struct Simulated {
    file: TemplateFile,
    size: Size,
}

impl Simulated {
    /// Writes the template into the folder.
    pub(super) fn create(folder: &Path, size: Size) -> Result<Self> {
        let pages = |mib: u32| u64::from(mib) * PAGES_PER_MIB;
        let mut layout = Layout::default();
        layout.holes.push(pages(size.data_mib)..pages(size.mem_mib));
        let model = TemplateModel {
            size: u64::from(size.mem_mib) * MIB,
            seed: 1,
            layout,
        };
        let file = TemplateFile::create_at(&folder.join("mem"), model).context("failed to write the template")?;
        Ok(Self { file, size })
    }
}

impl Template for Simulated {
    fn mem_file(&self) -> &Path {
        self.file.path()
    }

    fn working_set(&self) -> Range<u32> {
        0..self.size.data_mib
    }

    fn whole(&self) -> Range<u32> {
        0..self.size.mem_mib
    }

    fn start(&self) -> Result<Box<dyn Blank + '_>> {
        Ok(Box::new(Started {
            vmm: sim_vmm::spawn()?,
            model: self.file.model(),
        }))
    }
}

struct Started<'a> {
    vmm: SimVmm,
    model: &'a TemplateModel,
}

impl Blank for Started<'_> {
    fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    fn restore(self: Box<Self>, tag: NonZeroU8, memory: &MemBackend) -> Result<(Box<dyn Vmm>, Duration)> {
        let Self { vmm, model } = *self;
        let started = Instant::now();
        match memory.backend_type {
            BackendType::File => vmm.run(MapFile::new(&memory.backend_path, model))?,
            BackendType::Uffd => drop(vmm.run(Connect::new(&memory.backend_path, model))?),
        }
        let fork = Fork {
            vmm,
            generation: tag.into(),
        };
        Ok((Box::new(fork), started.elapsed()))
    }
}

struct Fork {
    vmm: SimVmm,
    generation: NonZeroU32,
}

impl Vmm for Fork {
    fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    fn touch(&mut self, mib: Range<u32>) -> Result<()> {
        self.vmm.run(Visit {
            runs: std::iter::once(u64::from(mib.start) * PAGES_PER_MIB..u64::from(mib.end) * PAGES_PER_MIB).collect(),
            write: false,
        })?;
        Ok(())
    }

    fn verify(&mut self, mib: Range<u32>) -> Result<Mismatches> {
        let read = Read {
            pages: pages(&mib),
            ..Read::default()
        };
        let checked = self.vmm.run(read)?.checked;
        Ok(Mismatches {
            count: checked.mismatches,
            first: checked.first_mismatch.map(|first| format!("{first:x?}")),
        })
    }

    fn write(&mut self, mib: Range<u32>) -> Result<()> {
        let every = NonZeroU32::new(WRITE_EVERY).context("some pages are written")?;
        self.vmm.run(Write {
            pages: pages(&mib).every(every),
            generation: self.generation,
            threads: 1,
        })?;
        Ok(())
    }
}

fn pages(mib: &Range<u32>) -> Pages {
    Pages::range(u64::from(mib.start) * PAGES_PER_MIB..u64::from(mib.end) * PAGES_PER_MIB)
}
