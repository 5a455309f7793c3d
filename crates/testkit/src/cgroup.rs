//! A memory cgroup for the time of a test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::skip::skip;

/// A memory cgroup beneath the one that the test is in. Dropping it removes it, once those in it are dead.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    limit: &'static str,
}

impl Cgroup {
    /// Makes one. `None`, and says that the test is skipped, where there can be none.
    ///
    /// # Errors
    ///
    /// The kernel does not say which cgroups this process is in.
    pub fn new() -> Result<Option<Self>> {
        let groups = procfs::process::Process::myself()?.cgroups()?;
        let ours = |wanted: &dyn Fn(&procfs::ProcessCGroup) -> bool| {
            let group = (&groups).into_iter().find(|group| wanted(group))?;
            Some(group.pathname.trim_start_matches('/').to_owned())
        };
        let of_memory = |group: &procfs::ProcessCGroup| group.controllers.iter().any(|name| name == "memory");
        let candidates = [
            ("/sys/fs/cgroup/memory", ours(&of_memory), "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", ours(&|group| group.hierarchy == 0), "memory.max"),
        ];
        for (root, ours, limit) in candidates {
            let Some(ours) = ours else { continue };
            let path = Path::new(root)
                .join(ours)
                .join(format!("pagecast-test-{}", std::process::id()));
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let cgroup = Self { path, limit };
            if cgroup.path.join(limit).exists() {
                return Ok(Some(cgroup));
            }
        }
        skip("no memory cgroup can be made here");
        Ok(None)
    }

    /// Where it is in the file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a process in.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn take(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("cannot move process {pid} to {}", self.path.display()))
    }

    /// What is charged to it, in bytes.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn used(&self) -> Result<u64> {
        let used = ["memory.usage_in_bytes", "memory.current"]
            .into_iter()
            .find_map(|name| fs::read_to_string(self.path.join(name)).ok());
        Ok(used.context("the cgroup does not say what it uses")?.trim().parse()?)
    }

    /// Limits it to so many bytes.
    ///
    /// # Errors
    ///
    /// The kernel's, for example because it uses more.
    pub fn limit(&self, bytes: u64) -> Result<()> {
        fs::write(self.path.join(self.limit), bytes.to_string())
            .with_context(|| format!("cannot limit {} to {bytes} bytes", self.path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Where somebody in it lives, an empty folder is left.
        let _ = fs::remove_dir(&self.path);
    }
}
