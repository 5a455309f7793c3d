//! Why a file cannot be a template.

use std::path::PathBuf;

/// Why a mem-file could not be opened as a template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file system refused.
    #[error("cannot open the mem-file {}", path.display())]
    Io {
        /// The path of the file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The path leads to something that is not a regular file.
    #[error("the mem-file {} is {what}, not a file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// The kind of the file.
        what: &'static str,
    },
    /// The file is empty, or its last page is incomplete.
    #[error("the mem-file {} has {size} bytes: not a positive multiple of 4096", path.display())]
    Size {
        /// The path of the file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
    },
    /// Templates cannot be served on this platform.
    #[error("templates are served on Linux only; elsewhere, restore from the mem-file itself")]
    Unsupported,
}
