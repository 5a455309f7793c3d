//! The traits that pages come through: [`PageSource`], and [`MappedPages`] if some of them are mapped.

#[cfg(target_os = "linux")]
use std::sync::Arc;

use pagecast_uffd::ByteLen;
#[cfg(target_os = "linux")]
use pagecast_uffd::MappedRange;

use super::run::TemplateOffset;
use super::zeros::ZeroMap;

/// The content of a range of a template, as far as it is known without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// Zeros only.
    Zero,
    /// Only [`PageSource::read`] can return the bytes, which may take a while.
    NotReady,
}

/// The source of the pages of a template: a local file, or anything else that can return its bytes.
///
/// | part | methods |
/// | --- | --- |
/// | pages | [`len`](Self::len), [`try_read`](Self::try_read), [`read`](Self::read), [`check_unchanged`](Self::check_unchanged) |
/// | zeros | [`zeros`](Self::zeros), [`knows_all_zeros`](Self::knows_all_zeros), [`find_zeros`](Self::find_zeros) |
/// | mapped pages | `mapping`, on Linux, if there are any |
///
/// Offsets and lengths are whole small pages (4 KiB) within [`len`](Self::len); a caller that asks for more gets
/// [`SourceError::Truncated`]. Every call may come from many threads at once.
pub trait PageSource: Send + Sync + 'static {
    /// The length of the template in bytes. Never changes.
    fn len(&self) -> ByteLen;

    /// Returns `true` if the source is empty. A template that can be served never is.
    fn is_empty(&self) -> bool {
        self.len().is_zero()
    }

    /// Returns the bytes at `at`, as many as `buffer` is long, **without waiting** for anything: no disk, no network,
    /// no lock that a slow read holds. Called on the fault path.
    ///
    /// `buffer` is room for the bytes. Bytes that are in memory already may be returned from there instead.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; never fewer bytes, and never zeros in place of bytes that are missing.
    fn try_read<'a>(&'a self, at: TemplateOffset, buffer: &'a mut [u8]) -> Result<Page<'a>, SourceError>;

    /// Fills `buffer` with the bytes at `at`, however long that takes. Never called on the fault path.
    ///
    /// # Errors
    ///
    /// [`SourceError`], as for [`try_read`](Self::try_read).
    fn read(&self, at: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError>;

    /// Checks that the template is still the one that was opened. Called after bytes were read and before a fork gets
    /// them, so it must be fast and wait for no server. A source that has to ask a server does so in
    /// [`read`](Self::read), and answers [`Page::NotReady`] to [`try_read`](Self::try_read). A source that checks all
    /// bytes against a digest as it reads them has nothing to do here.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`]; [`SourceError::Io`] if the check itself failed, which is no change.
    fn check_unchanged(&self) -> Result<(), SourceError>;

    /// The pages that are known to be zeros by now.
    fn zeros(&self) -> &ZeroMap;

    /// Returns `true` if all zeros are known from the beginning, so that no search is needed. Asked once for each
    /// template; later, [`Template::zeros_are_known`](super::Template::zeros_are_known) has the answer. Default:
    /// `false`.
    fn knows_all_zeros(&self) -> bool {
        false
    }

    /// Finds the pages of zeros in `len` bytes at `at`, and adds them to [`zeros`](Self::zeros). May read all bytes,
    /// and wait. By default finds none: a page not known to be zeros counts as data.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; what was found until then stays known.
    fn find_zeros(&self, at: TemplateOffset, len: ByteLen) -> Result<(), SourceError> {
        let _ = (at, len);
        Ok(())
    }

    /// The pages that can be installed without being read. Asked once for each template. Default: none.
    #[cfg(target_os = "linux")]
    fn mapping(self: Arc<Self>) -> Option<Arc<dyn MappedPages>> {
        None
    }
}

/// The pages of a [`PageSource`] that are mapped into this process, and copied to forks straight from there.
///
/// Such a page is installed without being read first. The caller must [check](PageSource::check_unchanged) the template
/// afterwards.
#[cfg(target_os = "linux")]
pub trait MappedPages: Send + Sync + 'static {
    /// The `len` bytes at `at`. `None` if they are not known to be in memory.
    fn resident_run(&self, at: TemplateOffset, len: ByteLen) -> Option<MappedRange<'_>>;

    /// The few pages at `at`, `len` bytes, if they are known to be in memory. Called on the fault path, for pages that are not zeros,
    /// so it queries nothing.
    fn known_resident(&self, at: TemplateOffset, len: ByteLen) -> Residency<'_>;

    /// Finds out whether the pages around `at` are in memory, and maps them if so. May wait. Called after
    /// [`Residency::MapFirst`], on a thread for slow reads.
    fn map(&self, at: TemplateOffset);

    /// Releases memory that was mapped to answer faults. It is mapped again on demand. Called when a fork has ended, or
    /// no fork has faulted for a while.
    fn release(&self);
}

/// Whether pages are known to be in memory.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug)]
pub enum Residency<'a> {
    /// They are, and can be copied from here.
    Mapped(MappedRange<'a>),
    /// Not yet: [`map`](MappedPages::map) may change that. Returned once for each part of the template, then again after a
    /// while.
    MapFirst,
    /// No.
    Unknown,
}

/// Why a template could not be read. No error is ever answered with guessed bytes.
///
/// A failure that [may pass](Self::may_pass) is retried for as long as a fault may wait. Any other failure at once ends
/// the fork that waits for the bytes. A [`PageSource`] chooses by the variant that it returns.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The template ends before the requested bytes do.
    #[error("the template ends before byte {end}: it was truncated, or a read exceeds its length")]
    Truncated {
        /// The end of the requested bytes.
        end: u64,
    },
    /// The template is no longer the one that was opened.
    #[error("the template has changed since it was opened: {how}")]
    Changed {
        /// What has changed.
        how: String,
    },
    /// The bytes cannot be read and never will be: for example, because their storage was deleted.
    #[error("the template can no longer be read at {at}: {how}")]
    Unreadable {
        /// Where.
        at: TemplateOffset,
        /// Why.
        how: String,
    },
    /// Reading failed, for a reason that may pass: an error of the disk or of the network, or too little memory.
    #[error("the template cannot be read at {at}")]
    Io {
        /// Where.
        at: TemplateOffset,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl SourceError {
    /// Returns `true` if a retry may succeed.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Io { .. } => true,
            Self::Truncated { .. } | Self::Changed { .. } | Self::Unreadable { .. } => false,
        }
    }

    /// A stable name: lower case, with underscores.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Changed { .. } => "template_changed",
            Self::Truncated { .. } => "template_truncated",
            Self::Unreadable { .. } | Self::Io { .. } => "template_unreadable",
        }
    }
}

impl Clone for SourceError {
    /// Copies the error for each waiter of a shared read. An [`std::io::Error`] without an error number keeps its kind
    /// and its text.
    fn clone(&self) -> Self {
        match self {
            Self::Truncated { end } => Self::Truncated { end: *end },
            Self::Changed { how } => Self::Changed { how: how.clone() },
            Self::Unreadable { at, how } => Self::Unreadable {
                at: *at,
                how: how.clone(),
            },
            Self::Io { at, source } => Self::Io {
                at: *at,
                source: match source.raw_os_error() {
                    Some(errno) => std::io::Error::from_raw_os_error(errno),
                    None => std::io::Error::new(source.kind(), source.to_string()),
                },
            },
        }
    }
}
