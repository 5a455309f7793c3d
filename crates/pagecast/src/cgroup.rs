//! Memory and hugepages that a process may still take before a cgroup's limit.

use std::fs;
use std::path::{Path, PathBuf};

use crate::proc_files;

/// The cgroups of this process.
const OWN: &str = "/proc/self/cgroup";

/// A memory cgroup, of version 1 or 2.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemoryCgroup {
    folder: PathBuf,
}

impl MemoryCgroup {
    /// Returns the memory cgroups that the process is in, up to the root. Each has its own limit for the process. Empty
    /// if they cannot be read.
    pub fn of_process(pid: i32) -> Vec<Self> {
        Self::of(&format!("/proc/{pid}/cgroup"))
    }

    /// Returns the memory cgroups of this process.
    pub fn own() -> Vec<Self> {
        Self::of(OWN)
    }

    fn of(path: &str) -> Vec<Self> {
        let folders = folders(path, "memory");
        folders.into_iter().map(|folder| Self { folder }).collect()
    }

    /// Returns its folder in the file system.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns its limit in bytes. `None` if it has none.
    pub fn limit(&self) -> Option<u64> {
        // "max" is no number: no limit. Version 1 uses a number near 2^63 instead.
        self.number("memory.max")
            .or_else(|| self.number("memory.limit_in_bytes"))
            .filter(|limit| *limit < 1 << 62)
    }

    /// Returns the bytes left before its limit. `None` if it has none.
    pub fn available(&self) -> Option<u64> {
        let limit = self.limit()?;
        let used = self
            .number("memory.current")
            .or_else(|| self.number("memory.usage_in_bytes"))?;
        // The kernel evicts inactive page cache before an allocation fails.
        let reclaimable = self
            .read("memory.stat")?
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
    }

    fn number(&self, name: &str) -> Option<u64> {
        number(&self.folder, name)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(name)).ok()
    }
}

/// A cgroup that may limit hugepages of 2 MiB, of version 1 or 2.
///
/// The kernel charges a hugepage to the process that installs it. With `UFFDIO_COPY` that is the page server, not the VMM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HugetlbCgroup {
    folder: PathBuf,
}

impl HugetlbCgroup {
    /// Returns the hugepage cgroups of this process, up to the root. Empty if they cannot be read.
    pub fn own() -> Vec<Self> {
        let folders = folders(OWN, "hugetlb");
        folders.into_iter().map(|folder| Self { folder }).collect()
    }

    /// Returns its folder in the file system.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns its limit in bytes. `None` if it has none.
    pub fn limit(&self) -> Option<u64> {
        self.limits().map(|(limit, _)| limit).min()
    }

    /// Returns the bytes of hugepages left before its limit. `None` if it has none.
    pub fn available(&self) -> Option<u64> {
        self.limits().map(|(limit, used)| limit.saturating_sub(used)).min()
    }

    /// Its limits with the usage of each: of pages, and of pages with reservations. A page without a reservation counts
    /// for both.
    fn limits(&self) -> impl Iterator<Item = (u64, u64)> {
        let names = ["", "rsvd."].into_iter().flat_map(|kind| {
            [("max", "current"), ("limit_in_bytes", "usage_in_bytes")].map(|(limit, used)| {
                (
                    format!("hugetlb.2MB.{kind}{limit}"),
                    format!("hugetlb.2MB.{kind}{used}"),
                )
            })
        });
        names.filter_map(|(limit, used)| {
            // "max" is no number: no limit. Version 1 uses a number near 2^63 instead.
            let limit = number(&self.folder, &limit).filter(|limit| *limit < 1 << 62)?;
            Some((limit, number(&self.folder, &used)?))
        })
    }
}

/// The cgroups of a controller that a file of `/proc` names, up to the root. Empty if they cannot be read.
fn folders(path: &str, controller: &str) -> Vec<PathBuf> {
    match (fs::read("/proc/self/mountinfo"), fs::read(path)) {
        (Ok(mountinfo), Ok(groups)) => named(&groups, &mountinfo, controller),
        _ => Vec::new(),
    }
}

/// The cgroups that `groups` (`/proc/PID/cgroup`) names. A mount or cgroup that cannot be read hides no other.
fn named(groups: &[u8], mountinfo: &[u8], controller: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for group in proc_files::cgroups(groups).flatten() {
        let unified = group.hierarchy == 0;
        if !unified && !group.has_controller(controller) {
            continue;
        }
        let Some(root) = mount_point(mountinfo, unified, controller) else {
            continue;
        };
        let leaf = root.join(group.path.strip_prefix("/").unwrap_or(group.path));
        let up_to_root = leaf.ancestors().take_while(|path| path.starts_with(&root));
        found.extend(up_to_root.map(Path::to_owned));
    }
    found
}

fn number(folder: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
}

fn mount_point(mountinfo: &[u8], unified: bool, controller: &str) -> Option<PathBuf> {
    proc_files::mounts(mountinfo)
        .flatten()
        .find(|mount| match (unified, mount.fs_type) {
            (true, b"cgroup2") => true,
            (false, b"cgroup") => mount.has_super_option(controller),
            _ => false,
        })
        .map(|mount| mount.mount_point)
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
    fn of_hugepages_the_tighter_limit_of_pages_and_reservations_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let cgroup = HugetlbCgroup {
            folder: dir.path().to_owned(),
        };
        assert_eq!((cgroup.limit(), cgroup.available()), (None, None));
        write("hugetlb.2MB.max", "max\n");
        write("hugetlb.2MB.current", "2097152\n");
        write("hugetlb.2MB.rsvd.max", "max\n");
        write("hugetlb.2MB.rsvd.current", "6291456\n");
        assert_eq!((cgroup.limit(), cgroup.available()), (None, None));
        write("hugetlb.2MB.max", "16777216\n");
        assert_eq!(cgroup.available(), Some(14_680_064));
        write("hugetlb.2MB.rsvd.max", "8388608\n");
        assert_eq!((cgroup.limit(), cgroup.available()), (Some(8_388_608), Some(2_097_152)));
        for name in ["max", "current", "rsvd.max", "rsvd.current"] {
            fs::remove_file(dir.path().join(format!("hugetlb.2MB.{name}"))).unwrap();
        }
        write("hugetlb.2MB.limit_in_bytes", "4194304\n");
        write("hugetlb.2MB.usage_in_bytes", "6291456\n");
        assert_eq!(cgroup.available(), Some(0));
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

    #[test]
    fn names_of_mounts_and_cgroups_that_are_not_utf8_hide_no_cgroup() {
        let mountinfo = b"35 23 0:30 / /home/a\xff rw shared:1 - fuse.a a rw\n\
            29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let groups = b"0::/jails/\xff\n";
        let folders: Vec<_> = named(groups, mountinfo, "memory")
            .into_iter()
            .map(|folder| folder.into_os_string().into_encoded_bytes())
            .collect();
        let expected: [&[u8]; 3] = [b"/sys/fs/cgroup/jails/\xff", b"/sys/fs/cgroup/jails", b"/sys/fs/cgroup"];
        assert_eq!(folders, expected);
    }
}
