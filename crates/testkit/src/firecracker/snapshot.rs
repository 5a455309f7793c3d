//! Snapshots of the tiny guest, to fork from.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::patterns::Patterns;
use super::{GuestRange, MicroVm};

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

impl Snapshot {
    /// Boots the tiny guest, fills its memory, pauses it and writes a snapshot into `folder`.
    ///
    /// # Errors
    ///
    /// If any of these fails, or the options do not fit each other.
    pub fn create(options: &SnapshotOptions, folder: &Path) -> Result<Self> {
        let whole_mib = options.mem_mib.saturating_sub(GuestRange::FIRST_MIB);
        ensure!(
            options.fill_mib <= whole_mib,
            "{} MiB do not fit in a guest of {} MiB, which keeps {} MiB to itself",
            options.fill_mib,
            options.mem_mib,
            GuestRange::FIRST_MIB
        );
        ensure!(
            options.pattern != 0,
            "pattern 0 is zeros, which a snapshot is not filled with"
        );
        let folder = folder
            .canonicalize()
            .with_context(|| format!("failed to resolve {}", folder.display()))?;
        let filled = GuestRange {
            start_mib: GuestRange::FIRST_MIB,
            count_mib: options.fill_mib,
        };
        let mem_path = folder.join("mem");
        let vmstate_path = folder.join("vmstate");

        let mut vm = MicroVm::boot(options)?;
        if options.fill_mib > 0 {
            vm.write(filled, 1, options.pattern)?;
        }
        vm.pause()?;
        vm.put(
            "/snapshot/create",
            &json!({ "snapshot_type": "Full", "snapshot_path": vmstate_path, "mem_file_path": mem_path }),
        )?;
        Ok(Self {
            mem_path,
            vmstate_path,
            filled,
            whole: GuestRange {
                start_mib: GuestRange::FIRST_MIB,
                count_mib: whole_mib,
            },
            patterns: vm.patterns().clone(),
        })
    }
}
