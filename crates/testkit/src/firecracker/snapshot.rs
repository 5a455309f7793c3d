//! Snapshots of the tiny guest, to fork from.

use std::path::PathBuf;

use super::GuestRange;
use super::patterns::Patterns;

/// What the guest of a snapshot looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// Memory of the guest, at most 3 GiB.
    pub mem_mib: u32,
    /// How much of it, from [`GuestRange::FIRST_MIB`] on, is filled with the pattern. The rest stays zero.
    pub fill_mib: u32,
    /// The pattern's number, 1 to 255. Templates that are to be told apart have different patterns.
    pub pattern: u8,
    /// Back the guest with 2 MiB pages of hugetlbfs, which must be reserved for as long as the snapshot is created and
    /// for each fork (see [`HugePages`](crate::hugepages::HugePages)).
    pub huge_pages: bool,
    /// Give the guest a balloon, so that it can give memory back (see [`MicroVm::inflate`]).
    pub balloon: bool,
    /// Give the guest a drive. It does not use it, but each microVM of the snapshot opens its file.
    pub drive: Option<Drive>,
}

/// A drive of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Its file, which has to exist, with some bytes in it.
    pub path: PathBuf,
    /// Whether Firecracker opens it for reading only.
    pub read_only: bool,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            mem_mib: 128,
            fill_mib: 64,
            pattern: 1,
            huge_pages: false,
            balloon: false,
            drive: None,
        }
    }
}

/// A full snapshot of a guest that waits for a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The guest's memory.
    pub mem_path: PathBuf,
    /// The rest of its state.
    pub vmstate_path: PathBuf,
    /// What was filled with the pattern.
    pub filled: GuestRange,
    /// All memory under test: what was filled and, after it, what stayed zero.
    pub whole: GuestRange,
    pub(crate) patterns: Patterns,
}

/// Where a restored Firecracker gets its guest's memory from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemBackend {
    /// A mem-file that it maps itself.
    File(PathBuf),
    /// The socket of a page server.
    Uffd(PathBuf),
}
