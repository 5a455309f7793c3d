//! Why a file cannot be a template.

use std::path::PathBuf;

/// Why a mem-file could not be opened as a template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file system says no.
    #[error("cannot open the mem-file {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no regular file.
    #[error("the mem-file {} is {what}, not a file", path.display())]
    NotAFile {
        /// Which path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It has no pages, or a part of one.
    #[error("the mem-file {} has {size} bytes: not a positive multiple of 4096", path.display())]
    Size {
        /// Which file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
    },
    /// This platform has no way to serve it.
    #[error("templates are served on Linux only; elsewhere, restore from the mem-file itself")]
    Unsupported,
}
