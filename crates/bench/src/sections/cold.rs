//! Dropping one file from the page cache.

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;

use anyhow::{Context as _, Result};
use pagecast_testkit::template_file::LAYOUT_PAGE;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use crate::spread::to_f64;

/// Drops the pages of this file from the page cache. No process may map them. Dirty pages are written first.
pub(super) fn drop_from_page_cache(file: &File) -> Result<()> {
    file.sync_all().context("failed to write the template to disk")?;
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).context("failed to drop the template from the page cache")
}

/// Returns the part of these pages that is in the page cache, from 0 to 1. Reads nothing from disk.
pub(super) fn cached(file: &File, runs: &[Range<u64>]) -> Result<f64> {
    let (mut looked, mut there) = (0_u64, 0_u64);
    let mut byte = [0];
    for run in runs {
        let mut buffer = [IoSliceMut::new(&mut byte)];
        looked += 1;
        match rustix::io::preadv2(file, &mut buffer, run.start * LAYOUT_PAGE, ReadWriteFlags::NOWAIT) {
            Ok(_) => there += 1,
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error).context("failed to look into the page cache"),
        }
    }
    Ok(to_f64(there) / to_f64(looked.max(1)))
}
