//! What the kernel says about the memory of a process.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use procfs::process::Process;

/// `/proc/PID/smaps_rollup`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Resident, without 2 MiB hugetlbfs pages.
    pub rss: u64,
    /// Resident, with each shared page divided by the number of its users.
    pub pss: u64,
    /// Pages that nobody else maps; of a file that only this process maps, the page cache too.
    pub private: u64,
    /// Pages that others map as well.
    pub shared: u64,
    /// hugetlbfs pages, which the kernel counts in none of the above.
    pub hugetlb: u64,
}

impl Memory {
    /// The memory of a process.
    ///
    /// # Errors
    ///
    /// If the process is gone, or is not ours to look at.
    pub fn of(pid: u32) -> Result<Self> {
        let rollup = i32::try_from(pid)
            .context("pid out of range")
            .and_then(|pid| Ok(Process::new(pid)?.smaps_rollup()?))
            .with_context(|| format!("failed to read /proc/{pid}/smaps_rollup"))?;
        let map = rollup
            .memory_map_rollup
            .0
            .first()
            .context("smaps_rollup is empty")?;
        Self::from_fields(&map.extension.map)
    }

    fn from_fields(fields: &HashMap<String, u64>) -> Result<Self> {
        let sum = |names: &[&str]| -> Result<u64> {
            names
                .iter()
                .map(|&name| {
                    fields
                        .get(name)
                        .copied()
                        .with_context(|| format!("smaps_rollup has no field {name}"))
                })
                .sum()
        };
        Ok(Self {
            rss: sum(&["Rss"])?,
            pss: sum(&["Pss"])?,
            private: sum(&["Private_Clean", "Private_Dirty"])?,
            shared: sum(&["Shared_Clean", "Shared_Dirty"])?,
            hugetlb: sum(&["Private_Hugetlb", "Shared_Hugetlb"])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_and_dirty_pages_are_added_up() -> Result<()> {
        let fields = [
            ("Rss", 100),
            ("Pss", 60),
            ("Private_Clean", 10),
            ("Private_Dirty", 20),
            ("Shared_Clean", 30),
            ("Shared_Dirty", 40),
            ("Private_Hugetlb", 5),
            ("Shared_Hugetlb", 6),
        ];
        let fields = fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let memory = Memory::from_fields(&fields)?;
        assert_eq!(
            memory,
            Memory {
                rss: 100,
                pss: 60,
                private: 30,
                shared: 70,
                hugetlb: 11
            }
        );
        Ok(())
    }

    #[test]
    fn our_own_memory_adds_up() -> Result<()> {
        let memory = Memory::of(std::process::id())?;
        assert!(memory.rss > 0);
        assert_eq!(memory.rss, memory.private + memory.shared);
        assert!(
            memory.pss >= memory.private && memory.pss <= memory.rss,
            "{memory:?}"
        );
        Ok(())
    }
}
