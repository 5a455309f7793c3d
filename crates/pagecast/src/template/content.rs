//! Identity of the content of a template, for data that is learned of it and kept.

use pagecast_uffd::ByteLen;

use super::identity::{FileState, KeptIdentity};

/// Identity of the content of a template. Data learned of a template (its zeros, its working set) is kept with it, and
/// used only for a template with the same identity.
///
/// The representation is private and depends on where the template comes from. A mem-file is identified by its
/// [`KeptIdentity`]. An image will be identified by a digest, which belongs here too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentIdentity {
    file: KeptIdentity,
}

/// What kept data says of a template, which decides how exactly the identity must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    /// The bytes of pages. Wrong data gives guests wrong bytes, so another ctime of a mem-file makes it stale.
    Bytes,
    /// Which pages are worth having early. Wrong data costs time, but no byte. So it outlives a change of the ctime
    /// alone: a link, a `chmod`, a `chown` of the folder.
    Advice,
}

impl ContentIdentity {
    /// The length of [`to_le_bytes`](Self::to_le_bytes) in bytes.
    pub(super) const BYTES: usize = KeptIdentity::BYTES;

    /// The length of the template.
    pub(super) fn template_len(&self) -> ByteLen {
        ByteLen::new(self.file.size())
    }

    /// Describes how `now` differs. `None` if data that `says` this of `self` is still right for `now`.
    pub(super) fn difference(&self, now: &Self, says: Says) -> Option<String> {
        match says {
            Says::Bytes => self.file.difference(&now.file),
            Says::Advice => self.file.difference_but_ctime(&now.file),
        }
    }

    /// The encoding in version 2 of sidecar files.
    pub(super) fn to_le_bytes(self) -> [u8; Self::BYTES] {
        self.file.to_le_bytes()
    }

    /// Decodes [`to_le_bytes`](Self::to_le_bytes).
    pub(super) fn from_le_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        KeptIdentity::from_le_bytes(bytes).into()
    }
}

impl From<KeptIdentity> for ContentIdentity {
    /// The identity of the content of a mem-file.
    fn from(file: KeptIdentity) -> Self {
        Self { file }
    }
}

impl FileState {
    /// The identity of the content that the file has now.
    pub fn content(&self) -> ContentIdentity {
        (*self.kept()).into()
    }
}
