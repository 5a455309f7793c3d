//! The jailer of a run, and the files that the daemon places in its jails.
//!
//! A fork is created before its jailer starts. The jailer copies the mounts of the host, and the daemon may mount files
//! in the jail.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use pagecast_firecracker::Jailer;
use rustix::process::geteuid;

use super::firecracker::is_executable;

/// The jailer's default.
const CHROOT_BASE: &str = "/srv/jailer";
/// The socket for `uffd` in the root directory of a jail.
pub(crate) const UFFD_SOCKET: &str = "uffd.sock";
/// The memory file for `file` in the root directory of a jail.
pub(crate) const MEM_FILE: &str = "mem";

/// How to jail Firecrackers.
#[derive(Args, Debug)]
pub(crate) struct JailerArgs {
    /// Start each Firecracker with this jailer: in a root directory and a PID namespace of its own. Needs root.
    ///
    /// The state file is copied into the jail. With `file`, the user of the jail must be able to read the memory file.
    /// With `uffd`, the host needs /dev/userfaultfd, which the jailer puts into the jail, or the sysctl
    /// `vm.unprivileged_userfaultfd=1`. Drives and other files of the snapshot are not put into the jail.
    #[arg(long, value_name = "PATH", requires_all = ["uid", "gid"], conflicts_with = "dir")]
    jailer: Option<PathBuf>,

    /// User ID for jailed Firecrackers.
    #[arg(long, value_name = "UID", requires = "jailer")]
    uid: Option<u32>,

    /// Group ID for jailed Firecrackers.
    #[arg(long, value_name = "GID", requires = "jailer")]
    gid: Option<u32>,

    /// Folder in which to create the folder of the run, with the jails in it. Its file system must not be mounted with
    /// nodev [default: /srv/jailer]
    #[arg(long, value_name = "DIR", requires = "jailer")]
    chroot_base_dir: Option<PathBuf>,

    /// Put each jailed Firecracker into a cgroup with this setting, such as memory.max=1073741824. May be repeated.
    #[arg(long, value_name = "FILE=VALUE", requires = "jailer")]
    cgroup: Vec<String>,
}

impl JailerArgs {
    /// The program of the jailer and its settings, if one is named. Checks that it exists and that this user may run
    /// it.
    pub(crate) fn find(&self) -> Result<Option<(PathBuf, Jailer)>> {
        let (Some(path), Some(uid), Some(gid)) = (&self.jailer, self.uid, self.gid) else {
            return Ok(None);
        };
        ensure!(geteuid().is_root(), "the jailer must be started by root");
        let path = path
            .canonicalize()
            .with_context(|| format!("there is no jailer at {}", path.display()))?;
        ensure!(
            is_executable(&path),
            "{} is not a file that this user may execute",
            path.display()
        );
        let base = self.chroot_base_dir.clone().unwrap_or_else(|| CHROOT_BASE.into());
        fs::create_dir_all(&base).with_context(|| format!("cannot create {}", base.display()))?;
        let jailer = Jailer::new(base, uid, gid).context("cannot become a subreaper")?;
        Ok(Some((path, jailer.with_cgroups(self.cgroup.iter().cloned()))))
    }
}
