//! Cgroups for the time of a test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::hugepages::HugePages;
use crate::skip::skip;

/// A cgroup below that of the test. Dropping it moves this process out and removes it, once its other processes are
/// dead.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    limit: &'static str,
}

impl Cgroup {
    /// Creates one that limits memory. `None`, and a reported skip, if none can be created.
    ///
    /// # Errors
    ///
    /// The cgroups of this process cannot be read.
    pub fn new() -> Result<Option<Self>> {
        Self::of("memory", "memory.limit_in_bytes", "memory.max")
    }

    /// Creates one that limits the number of threads. `None`, and a reported skip, if none can be created.
    ///
    /// # Errors
    ///
    /// The cgroups of this process cannot be read.
    pub fn of_threads() -> Result<Option<Self>> {
        Self::of("pids", "pids.max", "pids.max")
    }

    /// Creates one of a controller, with the names of its limit file in version 1 and in version 2.
    fn of(controller: &str, limit_v1: &'static str, limit_v2: &'static str) -> Result<Option<Self>> {
        let groups = procfs::process::Process::myself()?.cgroups()?;
        let ours = |wanted: &dyn Fn(&procfs::ProcessCGroup) -> bool| {
            let group = (&groups).into_iter().find(|group| wanted(group))?;
            Some(group.pathname.trim_start_matches('/').to_owned())
        };
        let has_it = |group: &procfs::ProcessCGroup| group.controllers.iter().any(|name| name == controller);
        let candidates = [
            (Path::new("/sys/fs/cgroup").join(controller), ours(&has_it), limit_v1),
            (
                PathBuf::from("/sys/fs/cgroup"),
                ours(&|group| group.hierarchy == 0),
                limit_v2,
            ),
        ];
        for (root, ours, limit) in candidates {
            let Some(ours) = ours else { continue };
            let path = root.join(ours).join(format!("pagecast-test-{}", std::process::id()));
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let cgroup = Self { path, limit };
            if cgroup.path.join(limit).exists() {
                return Ok(Some(cgroup));
            }
        }
        skip(&format!("no cgroup of {controller} can be created here"));
        Ok(None)
    }

    /// Its folder in the file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn take(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("cannot move process {pid} to {}", self.path.display()))
    }

    /// Returns the bytes that are charged to it.
    ///
    /// # Errors
    ///
    /// The kernel does not show them.
    pub fn used(&self) -> Result<u64> {
        let used = ["memory.usage_in_bytes", "memory.current"]
            .into_iter()
            .find_map(|name| fs::read_to_string(self.path.join(name)).ok());
        Ok(used.context("the cgroup does not show its usage")?.trim().parse()?)
    }

    /// Limits it to `n` bytes or threads. Existing threads stay, but no more can start.
    ///
    /// # Errors
    ///
    /// The kernel's, for example because it uses more bytes.
    pub fn limit(&self, most: u64) -> Result<()> {
        fs::write(self.path.join(self.limit), most.to_string())
            .with_context(|| format!("cannot limit {} to {most}", self.path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Some(parent) = self.path.parent() {
            let _ = fs::write(parent.join("cgroup.procs"), std::process::id().to_string());
        }
        // If a process in it lives, an empty folder is left.
        let _ = fs::remove_dir(&self.path);
    }
}

/// A cgroup that this process is in and that limits the hugepages it installs. Dropping it moves this process out
/// again.
#[derive(Debug)]
pub struct HugetlbCgroup {
    path: PathBuf,
    root: PathBuf,
    /// Whether the controller was off before.
    enabled: bool,
}

impl HugetlbCgroup {
    /// Creates one and moves this process into it; its children stay where they are. `None`, and a reported skip, if
    /// none can be created. Meanwhile the controller is on for the whole machine; `_alone` ensures that no other test
    /// changes it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn enter(_alone: &HugePages) -> Result<Option<Self>> {
        let is_there = |root: &str| {
            let controllers = fs::read_to_string(Path::new(root).join("cgroup.controllers"));
            controllers.is_ok_and(|names| names.split_whitespace().any(|name| name == "hugetlb"))
        };
        let Some(root) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .into_iter()
            .find(|root| is_there(root))
        else {
            skip("no cgroup of version 2 limits hugepages here");
            return Ok(None);
        };
        let root = PathBuf::from(root);
        let groups = procfs::process::Process::myself()?.cgroups()?;
        if !(&groups)
            .into_iter()
            .any(|group| group.hierarchy == 0 && group.pathname == "/")
        {
            skip("this process is not in the root of the cgroups, where a limit could be set beneath it");
            return Ok(None);
        }
        let control = root.join("cgroup.subtree_control");
        let enabled = !fs::read_to_string(&control)?.contains("hugetlb");
        if enabled {
            fs::write(&control, "+hugetlb").context("failed to enable the hugetlb controller")?;
        }
        let path = root.join(format!("pagecast-test-{}", std::process::id()));
        let cgroup = Self { path, root, enabled };
        fs::create_dir(&cgroup.path).context("failed to make a cgroup")?;
        move_self(&cgroup.path)?;
        Ok(Some(cgroup))
    }

    /// Its folder in the file system.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Limits it to `n` pages of 2 MiB.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn limit(&self, pages: u64) -> Result<()> {
        fs::write(self.path.join("hugetlb.2MB.max"), (pages << 21).to_string()).context("failed to limit hugepages")
    }

    /// Returns the bytes of hugepages that are charged to it.
    ///
    /// # Errors
    ///
    /// The kernel does not show them.
    pub fn used(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.path.join("hugetlb.2MB.current"))?
            .trim()
            .parse()?)
    }
}

fn move_self(to: &Path) -> Result<()> {
    fs::write(to.join("cgroup.procs"), std::process::id().to_string())
        .with_context(|| format!("failed to move this process to {}", to.display()))
}

impl Drop for HugetlbCgroup {
    fn drop(&mut self) {
        // An error cannot be reported here.
        let _ = move_self(&self.root);
        let _ = fs::remove_dir(&self.path);
        if self.enabled {
            let _ = fs::write(self.root.join("cgroup.subtree_control"), "-hugetlb");
        }
    }
}
