//! Resources of a process, to find leaks and shared memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use procfs::process::{MMapPath, MemoryMap, Process};

/// Resources of a process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessUse {
    /// Open file descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: u64,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
    /// Resident memory that belongs to no file, in bytes: anonymous and shared memory.
    pub own_bytes: u64,
    /// CPU time used so far, in user and kernel mode, to the clock tick.
    pub cpu_time: Duration,
}

impl ProcessUse {
    /// Returns the current resources of the process `pid`.
    ///
    /// # Errors
    ///
    /// There is no such process, or this user may not read them.
    pub fn of(pid: u32) -> Result<Self> {
        let process = process(pid)?;
        let (stat, status) = (process.stat()?, process.status()?);
        Ok(Self {
            fds: process.fd_count()?,
            threads: stat.num_threads.try_into()?,
            rss_bytes: stat.rss * procfs::page_size(),
            own_bytes: status
                .rssanon
                .zip(status.rssshmem)
                .map_or(0, |(anon, shmem)| (anon + shmem) << 10),
            cpu_time: Duration::from_millis((stat.utime + stat.stime) * 1000 / procfs::ticks_per_second()),
        })
    }
}

/// The memory of a process as its share of the host's (`smaps_rollup`), in bytes. Hugepages are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Resident memory (RSS).
    pub rss_bytes: u64,
    /// Resident memory, each shared page divided by the number of processes that map it (PSS).
    pub pss_bytes: u64,
    /// Memory that no other process maps.
    pub private_bytes: u64,
    /// Memory that other processes map, too.
    pub shared_bytes: u64,
    /// Hugepages, private and shared.
    pub hugetlb_bytes: u64,
}

impl MemoryUse {
    /// Returns the memory of the process `pid`.
    ///
    /// # Errors
    ///
    /// There is no such process, or this user may not read it.
    pub fn of(pid: u32) -> Result<Self> {
        let rollup = process(pid)?.smaps_rollup()?.memory_map_rollup;
        Ok(Self::sum(&rollup.iter()))
    }

    /// Returns the memory of the process `pid` in mappings of `file`. Other processes that start or end do not change it, unless
    /// they map the file.
    ///
    /// # Errors
    ///
    /// There is no such process, or this user may not read it.
    pub fn of_file(pid: u32, file: &Path) -> Result<Self> {
        let maps = process(pid)?.smaps()?;
        let is_of_file = |map: &&MemoryMap| matches!(&map.pathname, MMapPath::Path(path) if path == file);
        Ok(Self::sum(&maps.iter().filter(is_of_file)))
    }

    fn sum<'a>(maps: &(impl Iterator<Item = &'a MemoryMap> + Clone)) -> Self {
        let sum = |names: &[&str]| {
            let values = maps
                .clone()
                .flat_map(|map| names.iter().filter_map(|name| map.extension.map.get(*name)));
            values.sum()
        };
        Self {
            rss_bytes: sum(&["Rss"]),
            pss_bytes: sum(&["Pss"]),
            private_bytes: sum(&["Private_Clean", "Private_Dirty"]),
            shared_bytes: sum(&["Shared_Clean", "Shared_Dirty"]),
            hugetlb_bytes: sum(&["Private_Hugetlb", "Shared_Hugetlb"]),
        }
    }
}

/// Returns the open file descriptors of this process and their files, for the message of a leak test.
///
/// # Errors
///
/// `/proc` is missing.
pub fn own_fds() -> Result<BTreeMap<i32, String>> {
    let mut fds = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // The descriptor of the listing itself is closed by now.
        if let Ok(target) = std::fs::read_link(entry.path()) {
            let number = entry.file_name().to_string_lossy().parse()?;
            fds.insert(number, target.to_string_lossy().into_owned());
        }
    }
    fds.retain(|number, _| std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok());
    Ok(fds)
}

fn process(pid: u32) -> Result<Process> {
    Process::new(pid.try_into()?).with_context(|| format!("no process {pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_file_and_touched_memory_show() {
        let pid = std::process::id();
        let before = ProcessUse::of(pid).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let memory = std::hint::black_box(vec![1_u8; 32 << 20]);
        let after = ProcessUse::of(pid).unwrap();
        assert!(after.fds > before.fds);
        assert!(after.rss_bytes >= before.rss_bytes + (30 << 20));
        assert!(MemoryUse::of(pid).unwrap().private_bytes >= 30 << 20);
        assert!(own_fds().unwrap().values().any(|target| target == "/dev/null"));
        drop((file, memory));
    }
}
