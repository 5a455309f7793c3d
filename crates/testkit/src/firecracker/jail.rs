//! The real jailer: a Firecracker with its own root directory, user, PID namespace and cgroup.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use pagecast_firecracker::{CgroupVersion, Jailer, remove_cgroups};
use rustix::process::geteuid;
use tempfile::TempDir;

use super::binary;
use crate::skip::{Need, skip};

/// The memory limit of a cgroup in bytes: more than a Firecracker with the tiny guest needs.
const MEMORY_LIMIT: u64 = 2 << 30;
const CGROUPS: &str = "/sys/fs/cgroup";
/// The id of the jail, which is the only one below its folder.
const ID: &str = "jailed";

/// The jail of one Firecracker. Its root directory exists before the start, so that sockets and files can be placed
/// there. Dropping it removes the folder and the cgroup, in which no process may be left.
#[derive(Debug)]
pub struct Jail {
    place: pagecast_firecracker::Jail,
    cgroup: Option<PathBuf>,
    base: TempDir,
}

impl Jail {
    /// Creates the root directory for a Firecracker that runs as this user and group. `None`, and a reported skip, if
    /// this process is not root.
    ///
    /// # Errors
    ///
    /// Firecracker is missing, or the folder cannot be created.
    pub fn new(uid: u32, gid: u32) -> Result<Option<Self>> {
        if !geteuid().is_root() {
            skip((Need::Root, "for the jailer"));
            return Ok(None);
        }
        let base = tempfile::Builder::new()
            .prefix("pagecast-jail-")
            .tempdir()
            .context("failed to create a folder for jails")?;
        let (setting, mount) = match CgroupVersion::of_host() {
            CgroupVersion::V1 => ("memory.limit_in_bytes", Path::new(CGROUPS).join("memory")),
            CgroupVersion::V2 => ("memory.max", PathBuf::from(CGROUPS)),
        };
        let mut jailer = Jailer::new(base.path(), uid, gid).context("failed to become a subreaper")?;
        let mut cgroup = None;
        if mount.join("cgroup.procs").exists() {
            jailer = jailer.with_cgroups([format!("{setting}={MEMORY_LIMIT}")]);
            let parent = base.path().file_name().context("a folder has a name")?;
            cgroup = Some(mount.join(parent).join(ID));
        }
        let place = jailer
            .jail(&binary()?, ID)
            .context("failed to create the root of a jail")?;
        Ok(Some(Self { place, cgroup, base }))
    }

    /// The root directory of the Firecracker, as the host sees it.
    pub fn root(&self) -> PathBuf {
        self.place.root()
    }

    /// The user that Firecracker runs as.
    pub fn uid(&self) -> u32 {
        self.place.jailer().uid()
    }

    /// The group that Firecracker runs as.
    pub fn gid(&self) -> u32 {
        self.place.jailer().gid()
    }

    /// The cgroup of Firecracker, if this host has one for memory.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// The jail itself.
    pub(crate) fn place(&self) -> &pagecast_firecracker::Jail {
        &self.place
    }

    /// Returns `true` if the root directory of a process is that of this jail.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub fn confines(&self, pid: u32) -> Result<bool> {
        Ok(self.place.confines(pid.try_into()?)?)
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        // A cgroup with a process in it stays, and the test that looks for it fails.
        let _ = remove_cgroups(self.base.path().file_name().unwrap_or_default());
    }
}
