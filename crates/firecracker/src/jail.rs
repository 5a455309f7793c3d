//! Firecrackers that the jailer starts: each in a root directory and a PID namespace of its own, as another user.
//!
//! ```text
//! BASE/                   --chroot-base-dir of the jailer
//!     PROGRAM/ID/         the folder of a jail; PROGRAM is the name of Firecracker's file
//!         stdout, stderr  out of reach of the jail
//!         root/           the root directory of the jail
//!             api.sock, vmstate
//! ```
//!
//! The jailer copies the mounts of the host when it starts. So a mount in the jail must be made before that.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, Uid, chown};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal, set_child_subreaper};

use crate::{CgroupVersion, Process};

const ROOT: &str = "root";
/// The state file in the root directory.
const VMSTATE: &str = "vmstate";
const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";
/// Time that killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Settings of the jailer for all jails below one folder.
#[derive(Clone, Debug)]
pub struct Jailer {
    base: PathBuf,
    uid: u32,
    gid: u32,
    cgroups: Vec<String>,
}

/// The folder of one jailed Firecracker.
#[derive(Debug)]
pub struct Jail {
    jailer: Jailer,
    program: PathBuf,
    folder: PathBuf,
}

impl Jailer {
    /// Jails Firecrackers below the folder `base`, as the user `uid` and the group `gid`.
    ///
    /// Makes this process a subreaper: a jailer exits after it has started its Firecracker, which then becomes our
    /// child.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn new(base: impl Into<PathBuf>, uid: u32, gid: u32) -> io::Result<Self> {
        set_child_subreaper(Some(getpid()))?;
        Ok(Self {
            base: base.into(),
            uid,
            gid,
            cgroups: Vec::new(),
        })
    }

    /// Puts each Firecracker into a cgroup with these settings, `FILE=VALUE` each. The parent of the cgroups is named
    /// after the folder `base`; [`remove_cgroups`](crate::remove_cgroups) removes it.
    #[must_use]
    pub fn with_cgroups(mut self, settings: impl IntoIterator<Item = String>) -> Self {
        self.cgroups.extend(settings);
        self
    }

    /// The same settings for jails below another folder.
    #[must_use]
    pub fn below(self, base: impl Into<PathBuf>) -> Self {
        Self {
            base: base.into(),
            ..self
        }
    }

    /// The folder that jails are below.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The user that Firecrackers run as.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The group that Firecrackers run as.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Creates the root directory of the jail `id` for the Firecracker at `program`, an absolute path.
    ///
    /// # Errors
    ///
    /// The directory cannot be created.
    pub fn jail(&self, program: &Path, id: &str) -> io::Result<Jail> {
        let name = program.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let jail = Jail {
            jailer: self.clone(),
            program: program.to_owned(),
            folder: self.base.join(name).join(id),
        };
        fs::create_dir_all(jail.root())?;
        Ok(jail)
    }
}

impl Jail {
    /// The root directory of the jail, as the host sees it.
    pub fn root(&self) -> PathBuf {
        self.folder.join(ROOT)
    }

    /// The settings that the jail was created with.
    pub fn jailer(&self) -> &Jailer {
        &self.jailer
    }

    /// The path in the jail of the file at `path`; `path` itself if it is outside of the jail.
    pub fn inside(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(self.root()) {
            Ok(inside) => Path::new("/").join(inside),
            Err(_) => path.to_owned(),
        }
    }

    /// Copies the state file of a snapshot into the jail. Returns its path as Firecracker sees it.
    ///
    /// # Errors
    ///
    /// `vmstate` is no regular file, or cannot be copied.
    pub fn copy_vmstate(&self, vmstate: &Path) -> io::Result<PathBuf> {
        // Copying a pipe would never end.
        if !fs::metadata(vmstate)?.is_file() {
            return Err(io::Error::other("the state file is not a regular file"));
        }
        let copy = self.root().join(VMSTATE);
        fs::copy(vmstate, &copy)?;
        self.give(&copy)?;
        Ok(self.inside(&copy))
    }

    /// Creates an empty file in the root directory, writable for Firecracker.
    pub(crate) fn create_file(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.root().join(name);
        File::create(&path)?;
        self.give(&path)?;
        Ok(path)
    }

    fn give(&self, path: &Path) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.jailer.uid), Gid::from_raw(self.jailer.gid));
        Ok(chown(path, Some(uid), Some(gid))?)
    }

    pub(crate) fn stdout(&self) -> PathBuf {
        self.folder.join(STDOUT)
    }

    pub(crate) fn stderr(&self) -> PathBuf {
        self.folder.join(STDERR)
    }

    /// Adds the arguments of the jailer to `command`, which starts it. The caller appends those of Firecracker.
    pub(crate) fn add_arguments(&self, command: &mut Command) {
        let Jailer {
            base,
            uid,
            gid,
            cgroups,
        } = &self.jailer;
        command
            .arg("--id")
            .arg(self.folder.file_name().unwrap_or_default())
            .arg("--exec-file")
            .arg(&self.program)
            .args(["--uid", &uid.to_string(), "--gid", &gid.to_string()])
            .arg("--chroot-base-dir")
            .arg(base)
            .arg("--new-pid-ns");
        if !cgroups.is_empty() {
            command
                .args(["--cgroup-version", CgroupVersion::of_host().as_str()])
                .arg("--parent-cgroup")
                .arg(base.file_name().unwrap_or_default());
            for setting in cgroups {
                command.args(["--cgroup", setting]);
            }
        }
        command.arg("--");
    }

    /// The Firecracker that the jailer has started here.
    pub(crate) fn process(&self) -> io::Result<Process> {
        let mut name = self.program.file_name().unwrap_or_default().to_owned();
        name.push(".pid");
        let pid = fs::read_to_string(self.root().join(name))?;
        let pid = pid.trim().parse().map_err(io::Error::other)?;
        let process = Process::open(pid)?;
        // The process is a child and we alone wait for it, so the process ID is still its own.
        if !self.confines(pid)? {
            return Err(io::Error::other(
                "the process that the jailer started is not in the jail",
            ));
        }
        Ok(process)
    }

    /// Returns `true` if the root directory of the process `pid` is that of the jail.
    ///
    /// # Errors
    ///
    /// There is no such process, or the jail is gone.
    pub fn confines(&self, pid: i32) -> io::Result<bool> {
        Ok(root_of(pid)? == identity(&fs::metadata(self.root())?))
    }
}

/// Kills all processes whose root directory is that of a jail in `folder`, the parent of jails, and waits for their
/// end.
///
/// # Errors
///
/// A process does not end.
pub fn kill_jailed(folder: &Path) -> io::Result<()> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let roots: BTreeMap<_, _> = entries
        .map(|entry| entry.path().join(ROOT))
        .filter_map(|root| Some((identity(&fs::symlink_metadata(&root).ok()?), root)))
        .collect();
    if roots.is_empty() {
        return Ok(());
    }
    let mut killed = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let is_jailed = || root_of(pid).is_ok_and(|root| roots.contains_key(&root));
        if !is_jailed() {
            continue;
        }
        let Some(pidfd) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            continue;
        };
        // Checked again: the pidfd now holds the process.
        if is_jailed() && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
            killed.push(pidfd);
        }
    }
    let patience = Timespec::try_from(PATIENCE).unwrap_or_default();
    for pidfd in killed {
        if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "a jailed process does not end"));
        }
    }
    Ok(())
}

/// The device and inode of the root directory of a process.
fn root_of(pid: i32) -> io::Result<(u64, u64)> {
    Ok(identity(&fs::metadata(format!("/proc/{pid}/root"))?))
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}
