//! The traits that pages come through: [`PageSource`], and [`MappedPages`] if some of them are mapped.

use std::fmt;
#[cfg(target_os = "linux")]
use std::sync::Arc;

use pagecast_uffd::ByteLen;
#[cfg(target_os = "linux")]
use pagecast_uffd::MappedRange;

use super::ZeroMap;

/// A position in a template, in bytes from its beginning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TemplateOffset(u64);

impl TemplateOffset {
    /// The position `bytes`.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for TemplateOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for TemplateOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a template holds somewhere, as far as that can be told without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// Zeros only.
    Zero,
    /// To be had by [`PageSource::read`], which may take a while.
    NotReady,
}

/// Where the pages of a template come from: a local file, or anything else that can give its bytes.
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

    /// Whether it is empty, which no template that can be served is.
    fn is_empty(&self) -> bool {
        self.len().is_zero()
    }

    /// The bytes from `at` on, as many as `buffer` is long, **without waiting** for anything: no disk, no network, no lock
    /// that a slow read holds. Called on the fault path.
    ///
    /// `buffer` is room to put them; bytes that are in memory anyway may be answered from there.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; never fewer bytes, and never zeros in place of bytes that are missing.
    fn try_read<'a>(&'a self, at: TemplateOffset, buffer: &'a mut [u8]) -> Result<Page<'a>, SourceError>;

    /// Fills `buffer` with the bytes from `at` on, however long that takes. Never called on the fault path.
    ///
    /// # Errors
    ///
    /// [`SourceError`], as for [`try_read`](Self::try_read).
    fn read(&self, at: TemplateOffset, buffer: &mut [u8]) -> Result<(), SourceError>;

    /// Makes sure that the template is still the one that was opened. Called after bytes have been read and before they are
    /// given to a fork, so it has to be fast, and waits for no server. A source that can only ask a server does so in
    /// [`read`](Self::read), and answers [`Page::NotReady`] to [`try_read`](Self::try_read). A source that checks all bytes as
    /// it reads them, against a digest, has nothing to do here.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`]; [`SourceError::Io`] if it cannot be told now, which is no change.
    fn check_unchanged(&self) -> Result<(), SourceError>;

    /// The pages that are known to be zeros by now.
    fn zeros(&self) -> &ZeroMap;

    /// Whether all zeros are known from the beginning, so that nobody has to look for them. Asked once for each template;
    /// [`Template::zeros_are_known`](super::Template::zeros_are_known) tells for the rest of its life. By default not.
    fn knows_all_zeros(&self) -> bool {
        false
    }

    /// Finds out which of the pages in `len` bytes from `at` on are zeros, and adds them to [`zeros`](Self::zeros). May read
    /// them all, and wait. By default finds none: all that is not known to be zeros is data.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; what was found until then stays known.
    fn find_zeros(&self, at: TemplateOffset, len: ByteLen) -> Result<(), SourceError> {
        let _ = (at, len);
        Ok(())
    }

    /// Those of its pages that can be installed without being read. Asked once for each template. By default none.
    #[cfg(target_os = "linux")]
    fn mapping(self: Arc<Self>) -> Option<Arc<dyn MappedPages>> {
        None
    }
}

/// The pages of a [`PageSource`] that are mapped into this process, and copied to forks straight from there.
///
/// A page that was installed so was not looked at before. The caller must [check](PageSource::check_unchanged) the template
/// afterwards.
#[cfg(target_os = "linux")]
pub trait MappedPages: Send + Sync + 'static {
    /// The `len` bytes from `at` on. `None` if they are not known to be in memory.
    fn resident_run(&self, at: TemplateOffset, len: ByteLen) -> Option<MappedRange<'_>>;

    /// The small page at `at`. `None` if it is not known to be in memory without asking for just this one, or is known to be
    /// zeros. Called on the fault path, if all zeros are known.
    fn resident_page(&self, at: TemplateOffset) -> Option<MappedRange<'_>>;

    /// Releases memory that was mapped to answer faults, which is mapped again when it is needed. Called when a fork has ended,
    /// or no fork has faulted for a while.
    fn release(&self);
}

/// Why a template could not be read. None of these is ever answered by guessing.
///
/// A failure that [may pass](Self::may_pass) is tried again for as long as a fault may wait; all others end who needs the
/// bytes at once. A [`PageSource`] says which of the two it is by the variant that it answers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// It ends before what was asked for.
    #[error("the template ends before byte {end}: it was truncated, or a read exceeds its length")]
    Truncated {
        /// The end of what was asked for.
        end: u64,
    },
    /// It is not what was opened any more.
    #[error("the template has changed since it was opened: {how}")]
    Changed {
        /// In what.
        how: String,
    },
    /// It cannot be read here and never will be: for example, because what holds the bytes was deleted.
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
    /// Whether the same may succeed if it is tried again.
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
    /// The same error for each who waits for the same read. An [`std::io::Error`] that is no error number keeps its kind and
    /// its text.
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
