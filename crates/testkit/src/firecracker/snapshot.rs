//! Snapshots of the tiny guest, to fork from.

use std::path::PathBuf;

use super::GuestRange;
use super::patterns::Patterns;

/// Options of the guest of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// Memory of the guest, at most 3 GiB.
    pub mem_mib: u32,
    /// Part of it that is filled with the pattern, from [`GuestRange::FIRST_MIB`] on. The rest stays zero.
    pub fill_mib: u32,
    /// Number of the pattern, 1 to 255. Different templates get different patterns.
    pub pattern: u8,
    /// Back the guest with 2 MiB pages of hugetlbfs, which must be reserved during the creation and for each fork (see
    /// [`HugePages`](crate::hugepages::HugePages)).
    pub huge_pages: bool,
    /// Give the guest a balloon, so that it can give memory back (see [`MicroVm::inflate`](super::MicroVm::inflate)).
    pub balloon: bool,
    /// Give the guest a drive. It does not use it, but each microVM of the snapshot opens its file.
    pub drive: Option<Drive>,
}

/// A drive of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Its file, which must exist and must not be empty.
    pub path: PathBuf,
    /// Whether Firecracker opens it read-only.
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
    /// The range that was filled with the pattern.
    pub filled: GuestRange,
    /// All memory under test: the filled range and the zeros after it.
    pub whole: GuestRange,
    pub(crate) patterns: Patterns,
}

/// The source of a restored guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemBackend {
    /// A mem-file that it maps itself.
    File(PathBuf),
    /// The socket of a page server.
    Uffd(PathBuf),
}
