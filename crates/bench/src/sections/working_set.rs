//! A template like a snapshot, mostly zeros, and the working set of its forks.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use pagecast_testkit::template_file::{LAYOUT_PAGE, Layout, TemplateFile, TemplateModel};

/// One page of this number has data: 80% are zeros, as in snapshots of real guests.
const DATA_ONE_IN: u64 = 5;
/// Data come in runs of 1 to twice this number of pages, less one.
const MEAN_RUN: u64 = 16;

/// A template, and the pages that its forks read, in this order.
#[derive(Clone, Debug)]
pub(super) struct WorkingSet {
    pub(super) model: TemplateModel,
    /// Runs of pages with data.
    pub(super) runs: Vec<Range<u64>>,
}

impl WorkingSet {
    /// Creates a template of `template` bytes: a fifth of it data in runs of random lengths, the rest zeros that are
    /// written out, as Firecracker does. Its working set is `size` bytes of its data, run after run in random order.
    /// The result is always the same.
    pub(super) fn new(template: u64, size: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let pages = template / LAYOUT_PAGE;
        let (mut runs, mut zeros) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < pages {
            let data = random.u64(1..2 * MEAN_RUN).min(pages - at);
            // Not in step with the run before, so that a run may begin anywhere in the kernel's readahead.
            let zero = random.u64(0..2 * (DATA_ONE_IN - 1) * MEAN_RUN).min(pages - at - data);
            runs.push(at..at + data);
            if zero > 0 {
                zeros.push(at + data..at + data + zero);
            }
            at += data + zero;
        }
        random.shuffle(&mut runs);
        let mut left = size / LAYOUT_PAGE;
        let mut visited = Vec::new();
        for run in runs {
            let end = run.end.min(run.start + left);
            left -= end - run.start;
            visited.push(run.start..end);
            if left == 0 {
                break;
            }
        }
        let layout = Layout {
            holes: zeros,
            ..Layout::default()
        };
        Self {
            model: TemplateModel {
                size: template,
                seed: 1,
                layout,
            },
            runs: visited,
        }
    }

    /// The template as a file without holes.
    pub(super) fn write(&self) -> Result<TemplateFile> {
        let template = TemplateFile::create(self.model.clone())?;
        let file = File::options().write(true).open(template.path());
        let file = file.context("failed to open the template")?;
        let longest = 2 * (DATA_ONE_IN - 1) * MEAN_RUN * LAYOUT_PAGE;
        let zeros = vec![0; usize::try_from(longest)?];
        for hole in &self.model.layout.holes {
            let len = usize::try_from((hole.end - hole.start) * LAYOUT_PAGE)?;
            file.write_all_at(&zeros[..len], hole.start * LAYOUT_PAGE)
                .context("failed to write zeros")?;
        }
        Ok(template)
    }

    /// Size of the working set in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum::<u64>() * LAYOUT_PAGE
    }
}

#[cfg(test)]
mod tests {
    use pagecast_testkit::template_file::Expected;

    use super::*;

    #[test]
    fn a_fifth_is_data_and_the_working_set_is_all_data() {
        let set = WorkingSet::new(512 << 20, 64 << 20);
        assert_eq!(set.bytes(), 64 << 20);
        let is_zero = |page: u64| set.model.expected(page * LAYOUT_PAGE) == Expected::Zero;
        let zeros = (0..set.model.size / LAYOUT_PAGE).filter(|page| is_zero(*page)).count() as u64;
        let percent = zeros * 100 / (set.model.size / LAYOUT_PAGE);
        assert!((78..=82).contains(&percent), "{percent}% zeros");
        assert!(set.runs.iter().cloned().flatten().all(|page| !is_zero(page)));
    }

    #[test]
    fn its_zeros_are_written_out() {
        let set = WorkingSet::new(1 << 20, 64 << 10);
        let template = set.write().unwrap();
        let file = File::open(template.path()).unwrap();
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap();
        assert_eq!(hole, 1 << 20, "the end is the first hole");
        let bytes = std::fs::read(template.path()).unwrap();
        for (page, bytes) in (0..).zip(bytes.chunks(4096)) {
            let is_zero = set.model.expected(page * LAYOUT_PAGE) == Expected::Zero;
            assert_eq!(bytes.iter().all(|byte| *byte == 0), is_zero, "page {page}");
        }
    }
}
