//! The real jailer: a Firecracker in a root directory of its own, as another user, in a PID namespace and a cgroup.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Gid, Uid, chown};
use rustix::process::geteuid;
use tempfile::TempDir;

use super::binary;
use super::binary::jailer;
use crate::skip::{Need, skip};

/// More than a Firecracker with the tiny guest needs.
const MEMORY_LIMIT: u64 = 2 << 30;
const CGROUPS: &str = "/sys/fs/cgroup";

/// Where one Firecracker is to be confined. Its root directory exists before it is started, so that sockets and files can
/// be put there. Dropping it removes the folder and the cgroup.
#[derive(Debug)]
pub struct Jail {
    folder: TempDir,
    id: String,
    uid: u32,
    gid: u32,
    firecracker: PathBuf,
    cgroup: Option<Cgroup>,
}

/// The cgroup that the jailer makes.
#[derive(Debug)]
struct Cgroup {
    version: &'static str,
    limit: &'static str,
    /// Of this jail alone, so that it can be removed.
    parent: String,
    path: PathBuf,
}

impl Jail {
    /// Makes the root directory for a Firecracker that is to run as this user and group. `None`, and says that the test is
    /// skipped, if this process is not root.
    ///
    /// # Errors
    ///
    /// Firecracker or the jailer cannot be had, or the folder cannot be made.
    pub fn new(uid: u32, gid: u32) -> Result<Option<Self>> {
        if !geteuid().is_root() {
            skip((Need::Root, "for the jailer"));
            return Ok(None);
        }
        let folder = tempfile::Builder::new()
            .prefix("pagecast-jail-")
            .tempdir()
            .context("failed to create a folder for jails")?;
        let name = folder.path().file_name().context("a folder has a name")?;
        let id = name.to_str().context("the name is text")?.to_owned();
        let jail = Self {
            cgroup: Cgroup::find(&id),
            id,
            uid,
            gid,
            firecracker: binary()?,
            folder,
        };
        fs::create_dir_all(jail.root()).context("failed to create the root of a jail")?;
        Ok(Some(jail))
    }

    /// The root directory of the Firecracker, as others see it.
    pub fn root(&self) -> PathBuf {
        let program = self.firecracker.file_name().unwrap_or_default();
        self.folder.path().join(program).join(&self.id).join("root")
    }

    /// The user that Firecracker runs as.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The group that Firecracker runs as.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// The cgroup that Firecracker is put in, if this host has one for memory.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_ref().map(|cgroup| &*cgroup.path)
    }

    /// The path that Firecracker knows what is at `path` by; `path` itself if that is outside of the jail.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(self.root()) {
            Ok(inside) => Path::new("/").join(inside),
            Err(_) => path.to_owned(),
        }
    }

    /// Copies a file into the root directory, for the user of the jail.
    pub(crate) fn take_in(&self, file: &Path) -> Result<PathBuf> {
        let name = file.file_name().context("a file has a name")?;
        let copy = self.root().join(name);
        fs::copy(file, &copy).with_context(|| format!("failed to copy {}", file.display()))?;
        self.give(&copy)?;
        Ok(self.inside(&copy))
    }

    /// Makes an empty file for the user of the jail.
    pub(crate) fn create_file(&self, name: &str) -> Result<()> {
        let path = self.root().join(name);
        File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
        self.give(&path)
    }

    fn give(&self, path: &Path) -> Result<()> {
        chown(path, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))
            .with_context(|| format!("failed to give {} to the user of the jail", path.display()))
    }

    /// The command line of the jailer, to which the arguments of Firecracker are to be added.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = Command::new(jailer()?);
        command
            .args(["--id", &self.id, "--new-pid-ns"])
            .args(["--uid", &self.uid.to_string(), "--gid", &self.gid.to_string()])
            .arg("--exec-file")
            .arg(&self.firecracker)
            .arg("--chroot-base-dir")
            .arg(self.folder.path());
        if let Some(cgroup) = &self.cgroup {
            command
                .args(["--cgroup-version", cgroup.version])
                .args(["--parent-cgroup", &cgroup.parent])
                .args(["--cgroup", &format!("{}={MEMORY_LIMIT}", cgroup.limit)]);
        }
        command.arg("--");
        Ok(command)
    }

    /// The pid that the jailer has written down for us.
    pub(crate) fn pid(&self) -> Result<u32> {
        let mut name = self.firecracker.file_name().unwrap_or_default().to_owned();
        name.push(".pid");
        let path = self.root().join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("the jailer left no {}", path.display()))?;
        let pid = text
            .trim()
            .parse()
            .with_context(|| format!("{} holds {text:?}", path.display()))?;
        ensure!(self.confines(pid)?, "the process {pid} is not in the jail");
        Ok(pid)
    }

    /// Whether the root directory of a process is this jail's.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub fn confines(&self, pid: u32) -> Result<bool> {
        let theirs = fs::metadata(format!("/proc/{pid}/root")).with_context(|| format!("no root of process {pid}"))?;
        let ours = fs::metadata(self.root()).context("the root of the jail is gone")?;
        Ok((theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()))
    }
}

impl Cgroup {
    fn find(id: &str) -> Option<Self> {
        let candidates = [("1", "memory", "memory.limit_in_bytes"), ("2", "", "memory.max")];
        let (version, folder, limit) = candidates.into_iter().find(|(_, folder, _)| {
            let list = if folder.is_empty() {
                "cgroup.controllers"
            } else {
                "cgroup.procs"
            };
            Path::new(CGROUPS).join(folder).join(list).exists()
        })?;
        let parent = format!("pagecast-{id}");
        Some(Self {
            version,
            limit,
            path: Path::new(CGROUPS).join(folder).join(&parent).join(id),
            parent,
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A cgroup with a process in it stays, and the test fails.
        let _ = fs::remove_dir(&self.path);
        let _ = self.path.parent().map(fs::remove_dir);
    }
}
