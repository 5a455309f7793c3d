//! Mem-files with known content.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::pattern::{Pattern, first_wrong_word};

/// Size of the pages of a [`Layout`] in bytes, for guests with larger pages, too.
pub const LAYOUT_PAGE: u64 = LAYOUT_PAGE_LEN as u64;

/// The same, for lengths in memory.
pub(crate) const LAYOUT_PAGE_LEN: usize = 4096;

/// Bytes that are read or written at once.
const CHUNK: usize = 1 << 20;

/// The content of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateModel {
    /// Its size in bytes, a multiple of [`LAYOUT_PAGE`].
    pub size: u64,
    /// The pattern of its data; different for every template of a test, so that none is taken for another.
    pub seed: u64,
    /// Its zeros.
    pub layout: Layout,
}

/// The zeros of a template, counted in [`LAYOUT_PAGE`]s. All other pages are data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The last of every `n` pages is written as zeros.
    pub zero_every: Option<NonZeroU64>,
    /// Ranges of pages that are holes of the file, in ascending order.
    pub holes: Vec<Range<u64>>,
}

/// The content of a page of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The words of this pattern.
    Pattern(Pattern),
    /// Zeros, in a hole or written out.
    Zero,
}

impl Expected {
    /// The word at `offset` bytes from the start of the template, a multiple of eight.
    pub const fn word(self, offset: u64) -> u64 {
        match self {
            Self::Pattern(pattern) => pattern.word(offset),
            Self::Zero => 0,
        }
    }
}

impl TemplateModel {
    /// A template of `size` bytes of data, without zeros.
    pub fn of_data(size: u64, seed: u64) -> Self {
        Self {
            size,
            seed,
            layout: Layout::default(),
        }
    }

    /// Returns the content of the page around `offset`.
    pub fn expected(&self, offset: u64) -> Expected {
        let page = offset / LAYOUT_PAGE;
        let zero = self
            .layout
            .zero_every
            .is_some_and(|every| page % every == every.get() - 1);
        if zero || self.is_hole(page) {
            Expected::Zero
        } else {
            Expected::Pattern(Pattern::of_template(self.seed))
        }
    }

    fn is_hole(&self, page: u64) -> bool {
        let holes = &self.layout.holes;
        let hole = holes.partition_point(|hole| hole.end <= page);
        holes.get(hole).is_some_and(|hole| hole.contains(&page))
    }
}

/// A mem-file on disk and its expected content.
#[derive(Debug)]
pub struct TemplateFile {
    path: PathBuf,
    model: TemplateModel,
    identity: Identity,
    /// Removed when this is dropped, if it was created for it.
    _directory: Option<TempDir>,
}

/// The metadata that changes when a file is replaced, truncated or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl TemplateFile {
    /// Creates the mem-file in a temporary folder, removed when this is dropped.
    ///
    /// # Errors
    ///
    /// The size is not whole pages, or the file cannot be written.
    pub fn create(model: TemplateModel) -> Result<Self> {
        let directory = tempfile::tempdir().context("failed to make a directory for a template")?;
        let path = directory.path().join("template.mem");
        Ok(Self {
            _directory: Some(directory),
            ..Self::create_at(&path, model)?
        })
    }

    /// Creates the mem-file at `path`, which must not exist. It is kept when this is dropped.
    ///
    /// # Errors
    ///
    /// The size is not whole pages, the path exists, or the file cannot be written.
    pub fn create_at(path: &Path, model: TemplateModel) -> Result<Self> {
        ensure!(
            model.size.is_multiple_of(LAYOUT_PAGE),
            "a template of {} bytes is not whole pages",
            model.size
        );
        let identity = write_model(path, &model).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            model,
            identity,
            _directory: None,
        })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Expected content of the file.
    pub fn model(&self) -> &TemplateModel {
        &self.model
    }

    /// Checks that the file is the created one, of the same size, never written since, and with the same bytes.
    ///
    /// # Errors
    ///
    /// The change, or why the file cannot be read.
    pub fn check_untouched(&self) -> Result<()> {
        let file = File::open(&self.path).with_context(|| format!("failed to open {}", self.path.display()))?;
        let identity = Identity::of(&file)?;
        ensure!(
            identity == self.identity,
            "the template was changed: it was {:?} and is {identity:?}",
            self.identity
        );
        let mut buffer = vec![0; CHUNK];
        let mut offset = 0;
        while offset < self.model.size {
            let length = buffer.len().min(usize::try_from(self.model.size - offset)?);
            let chunk = &mut buffer[..length];
            file.read_exact_at(chunk, offset)?;
            for (page, offset) in chunk.chunks(LAYOUT_PAGE_LEN).zip((offset..).step_by(LAYOUT_PAGE_LEN)) {
                let expected = self.model.expected(offset);
                let wrong = first_wrong_word(offset, page, |offset| expected.word(offset));
                ensure!(wrong.is_none(), "the template was changed: {wrong:x?}");
            }
            offset += u64::try_from(length)?;
        }
        Ok(())
    }
}

impl Identity {
    fn of(file: &File) -> Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

fn write_model(path: &Path, model: &TemplateModel) -> Result<Identity> {
    let file = File::create_new(path)?;
    file.set_len(model.size)?;
    let mut pending = Vec::with_capacity(CHUNK);
    let mut pending_at = 0;
    for offset in (0..model.size).step_by(LAYOUT_PAGE_LEN) {
        let is_hole = model.is_hole(offset / LAYOUT_PAGE);
        if is_hole || pending.len() == CHUNK {
            file.write_all_at(&pending, pending_at)?;
            pending.clear();
        }
        if is_hole {
            continue;
        }
        if pending.is_empty() {
            pending_at = offset;
        }
        let start = pending.len();
        pending.resize(start + LAYOUT_PAGE_LEN, 0);
        if let Expected::Pattern(pattern) = model.expected(offset) {
            pattern.fill(offset, &mut pending[start..]);
        }
    }
    file.write_all_at(&pending, pending_at)?;
    Identity::of(&file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixed() -> TemplateFile {
        TemplateFile::create(TemplateModel {
            size: 600 * LAYOUT_PAGE,
            seed: 3,
            layout: Layout {
                zero_every: NonZeroU64::new(5),
                holes: vec![10..20, 599..600],
            },
        })
        .unwrap()
    }

    #[test]
    fn the_file_is_what_its_model_says() {
        let template = mixed();
        template.check_untouched().unwrap();
        let bytes = std::fs::read(template.path()).unwrap();
        let page = |page: usize| &bytes[page * 4096..(page + 1) * 4096];
        assert!(page(4).iter().all(|byte| *byte == 0), "a page of zeros");
        assert!(page(12).iter().all(|byte| *byte == 0), "a hole");
        assert_eq!(Pattern::of_template(3).first_wrong_word(300 * 4096, page(300)), None);
        let file = File::open(template.path()).unwrap();
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap();
        assert_eq!(hole, 10 * LAYOUT_PAGE, "the first hole is where the layout has it");
    }

    #[test]
    fn a_written_template_is_noticed() {
        let template = mixed();
        let file = File::options().write(true).open(template.path()).unwrap();
        file.write_all_at(&[1], 12 * LAYOUT_PAGE).unwrap();
        // Restoring the mtime does not hide changed bytes.
        let modified = rustix::fs::Timespec {
            tv_sec: template.identity.modified.0,
            tv_nsec: template.identity.modified.1,
        };
        let times = rustix::fs::Timestamps {
            last_access: modified,
            last_modification: modified,
        };
        rustix::fs::futimens(&file, &times).unwrap();
        let error = template.check_untouched().unwrap_err();
        assert!(error.to_string().contains("expected: 0"), "{error}");
    }

    #[test]
    fn a_truncated_template_is_noticed() {
        let template = mixed();
        File::options()
            .write(true)
            .open(template.path())
            .unwrap()
            .set_len(4096)
            .unwrap();
        assert!(template.check_untouched().is_err());
    }
}
