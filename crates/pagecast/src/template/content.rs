//! What the content of a template is told by, for what is learned of it and kept.

use pagecast_uffd::ByteLen;

use super::identity::{FileState, KeptIdentity};

/// Identity of the content of a template. What is learned of a template (its zeros, its working set) is kept with it, and used
/// for a template with the same identity only.
///
/// What is inside depends on where the template comes from, and is nobody's business. The content of a mem-file is told by its
/// [`KeptIdentity`]. That of an image will be told by a digest, which belongs here, beside that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentIdentity {
    file: KeptIdentity,
}

/// What something that is kept says of a template, and so how sure its content must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    /// What its bytes are: if that is wrong, guests get wrong bytes. So another ctime of a mem-file makes it stale.
    Bytes,
    /// Which pages are worth having early: if that is wrong, it costs time and no byte. So it outlives what changes the ctime
    /// alone: a link, a `chmod`, a `chown` of the folder.
    Advice,
}

impl ContentIdentity {
    /// How many bytes [`to_le_bytes`](Self::to_le_bytes) makes.
    pub(super) const BYTES: usize = KeptIdentity::BYTES;

    /// The length of the template.
    pub(super) fn template_len(&self) -> ByteLen {
        ByteLen::new(self.file.size())
    }

    /// In what `now` differs, in words; `None` if what `says` so much of this is right for `now`.
    pub(super) fn difference(&self, now: &Self, says: Says) -> Option<String> {
        match says {
            Says::Bytes => self.file.difference(&now.file),
            Says::Advice => self.file.difference_but_ctime(&now.file),
        }
    }

    /// The bytes that stand for it in version 2 of sidecar files.
    pub(super) fn to_le_bytes(self) -> [u8; Self::BYTES] {
        self.file.to_le_bytes()
    }

    /// What [`to_le_bytes`](Self::to_le_bytes) was made of.
    pub(super) fn from_le_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        KeptIdentity::from_le_bytes(bytes).into()
    }
}

impl From<KeptIdentity> for ContentIdentity {
    /// That of a mem-file.
    fn from(file: KeptIdentity) -> Self {
        Self { file }
    }
}

impl FileState {
    /// Identity of the content that the file has now.
    pub fn content(&self) -> ContentIdentity {
        (*self.kept()).into()
    }
}
