//! How a snapshot of the tiny guest is made.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{GuestRange, MicroVm, Snapshot, SnapshotOptions};

impl Snapshot {
    /// Boots the tiny guest, fills its memory, pauses it and writes a snapshot into `folder`.
    ///
    /// # Errors
    ///
    /// One of these fails, or the options do not fit each other.
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
