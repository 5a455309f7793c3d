//! The source of a template, until the template is withdrawn.

use std::sync::{Arc, OnceLock};

use pagecast_uffd::ByteLen;

use super::run::TemplateOffset;
#[cfg(target_os = "linux")]
use super::source::MappedPages;
use super::source::{PageSource, SourceError};

/// A [`PageSource`], and the reason of its withdrawal, if there is one. Shared by a template and the threads that read
/// it.
pub(super) struct LiveSource {
    source: Arc<dyn PageSource>,
    /// The result of [`PageSource::mapping`], so that a fault does not ask.
    #[cfg(target_os = "linux")]
    mapping: Option<Arc<dyn MappedPages>>,
    withdrawn: OnceLock<String>,
}

impl LiveSource {
    pub(super) fn new(source: Arc<dyn PageSource>) -> Self {
        Self {
            #[cfg(target_os = "linux")]
            mapping: Arc::clone(&source).mapping(),
            source,
            withdrawn: OnceLock::new(),
        }
    }

    /// The source, withdrawn or not.
    pub(super) fn source(&self) -> &dyn PageSource {
        &*self.source
    }

    /// The mapped pages of the source, withdrawn or not.
    #[cfg(target_os = "linux")]
    pub(super) fn mapping(&self) -> Option<&dyn MappedPages> {
        self.mapping.as_deref()
    }

    /// Ends reading: each later [`read`](Self::read) and [`find_zeros`](Self::find_zeros) fails. The first reason stays.
    pub(super) fn withdraw(&self, how: &str) {
        let _ = self.withdrawn.set(how.to_owned());
    }

    /// Succeeds unless the source is withdrawn.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`] with the reason of the withdrawal.
    pub(super) fn check_not_withdrawn(&self) -> Result<(), SourceError> {
        match self.withdrawn.get() {
            Some(how) => Err(SourceError::Changed { how: how.clone() }),
            None => Ok(()),
        }
    }

    /// Reads `length` bytes at `at`. May block.
    pub(super) fn read(&self, at: TemplateOffset, length: usize) -> Result<Vec<u8>, SourceError> {
        self.check_not_withdrawn()?;
        let mut bytes = vec![0; length];
        self.source.read(at, &mut bytes)?;
        Ok(bytes)
    }

    /// Maps the pages around `at`, if they are in memory. May block.
    #[cfg(target_os = "linux")]
    pub(super) fn map(&self, at: TemplateOffset) {
        if let Some(mapping) = self.mapping()
            && self.check_not_withdrawn().is_ok()
        {
            mapping.map(at);
        }
    }

    /// Does nothing: pages are mapped on Linux only.
    #[cfg(not(target_os = "linux"))]
    #[expect(clippy::unused_self, reason = "as on Linux")]
    pub(super) fn map(&self, _at: TemplateOffset) {}

    /// Looks for zeros in `len` bytes at `at`. May block.
    pub(super) fn find_zeros(&self, at: TemplateOffset, len: ByteLen) -> Result<(), SourceError> {
        self.check_not_withdrawn()?;
        self.source.find_zeros(at, len)
    }
}
