//! How much memory a process may still take before a cgroup of its stops it.

use std::fs;
use std::path::{Path, PathBuf};

use procfs::ProcResult;
use procfs::process::{MountInfos, Process};

/// A memory cgroup, of version 1 or 2.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemoryCgroup {
    folder: PathBuf,
}

impl MemoryCgroup {
    /// The memory cgroups that the process is in, up to the root; none where that cannot be told. Each has a limit of its
    /// own that the process is held to.
    pub fn of_process(pid: i32) -> Vec<Self> {
        Self::of(&Process::new(pid))
    }

    /// Those of this process.
    pub fn own() -> Vec<Self> {
        Self::of(&Process::myself())
    }

    fn of(process: &ProcResult<Process>) -> Vec<Self> {
        let Some(mounts) = Process::myself().and_then(|process| process.mountinfo()).ok() else {
            return Vec::new();
        };
        let Some(groups) = process.as_ref().ok().and_then(|process| process.cgroups().ok()) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for group in groups {
            let unified = group.hierarchy == 0;
            if !unified && !group.controllers.iter().any(|controller| controller == "memory") {
                continue;
            }
            let Some(root) = mount_point(&mounts, unified) else {
                continue;
            };
            let leaf = root.join(group.pathname.trim_start_matches('/'));
            let up_to_root = leaf.ancestors().take_while(|path| path.starts_with(&root));
            found.extend(up_to_root.map(|folder| Self {
                folder: folder.to_owned(),
            }));
        }
        found
    }

    /// Where it is in the file system.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its limit in bytes; `None` where it has none.
    pub fn limit(&self) -> Option<u64> {
        // "max" is no number: no limit. Version 1 says a number near 2^63 instead.
        self.number("memory.max")
            .or_else(|| self.number("memory.limit_in_bytes"))
            .filter(|limit| *limit < 1 << 62)
    }

    /// How many bytes it can give before it reaches its limit; `None` where it has none.
    pub fn available(&self) -> Option<u64> {
        let limit = self.limit()?;
        let used = self
            .number("memory.current")
            .or_else(|| self.number("memory.usage_in_bytes"))?;
        // Page cache that nobody has used for long is given up before anybody is refused memory.
        let reclaimable = self
            .read("memory.stat")?
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.read(name)?.trim().parse().ok()
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(name)).ok()
    }
}

fn mount_point(mounts: &MountInfos, unified: bool) -> Option<PathBuf> {
    let mount = mounts.iter().find(|mount| match (unified, mount.fs_type.as_str()) {
        (true, "cgroup2") => true,
        (false, "cgroup") => mount.super_options.contains_key("memory"),
        _ => false,
    })?;
    Some(mount.mount_point.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_can_give_what_its_limit_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let cgroup = MemoryCgroup {
            folder: dir.path().to_owned(),
        };
        write("memory.max", "1000000\n");
        write("memory.current", "600000\n");
        write("memory.stat", "anon 1\ninactive_file 100000\nactive_file 7\n");
        assert_eq!((cgroup.limit(), cgroup.available()), (Some(1_000_000), Some(500_000)));
        write("memory.max", "max\n");
        assert_eq!((cgroup.limit(), cgroup.available()), (None, None));
    }

    #[test]
    fn the_largest_number_of_version_1_is_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        let cgroup = MemoryCgroup {
            folder: dir.path().to_owned(),
        };
        assert_eq!(cgroup.limit(), None);
    }
}
