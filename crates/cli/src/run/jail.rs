//! Firecrackers that the jailer starts: each in a root directory of its own, as another user, in a PID namespace of its own.
//!
//! ```text
//! CHROOT_BASE_DIR/pagecast-run-XXXXXX/        the folder of the run, which the jailer gets as its base
//!     PROGRAM/ID/                             PROGRAM is the name of the Firecracker's file
//!         stdout, stderr                      out of reach of the jail
//!         root/                               the root directory of the jail
//!             api.sock, vmstate
//!             uffd.sock, or mem               made by the daemon before the jailer is started
//! ```
//!
//! The jailer copies the mounts of the host when it starts. What the daemon puts into the jail may be a mount, so it has to
//! be there by then.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, Gid, Uid, access, chown};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, geteuid, getpid, pidfd_open, pidfd_send_signal,
    set_child_subreaper, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::exec;

/// As the jailer's own default.
const CHROOT_BASE: &str = "/srv/jailer";
/// Names in the root directory of a jail.
const ROOT: &str = "root";
const VMSTATE: &str = "vmstate";
pub(crate) const UFFD_SOCKET: &str = "uffd.sock";
const MEM_FILE: &str = "mem";
/// Beside it.
const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";
/// How long killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long until we look again whether the kernel lets go of a cgroup.
const PACE: Duration = Duration::from_millis(10);

/// How Firecrackers are confined.
#[derive(Args, Debug)]
pub(crate) struct JailerArgs {
    /// Start each Firecracker with this jailer: in a root directory and a PID namespace of its own. Needs root.
    ///
    /// The state file is copied into the jail. The memory file of `file` has to be readable for the user of the jail. The
    /// host has to have /dev/userfaultfd for `uffd`, which the jailer puts into the jail, or the sysctl
    /// `vm.unprivileged_userfaultfd=1`. Drives and other files of the snapshot are not put there.
    #[arg(long, value_name = "PATH", requires_all = ["uid", "gid"], conflicts_with = "dir")]
    jailer: Option<PathBuf>,

    /// The user that jailed Firecrackers run as.
    #[arg(long, value_name = "UID", requires = "jailer")]
    uid: Option<u32>,

    /// The group that jailed Firecrackers run as.
    #[arg(long, value_name = "GID", requires = "jailer")]
    gid: Option<u32>,

    /// Where to make the folder of the run, with the jails in it. Not on a file system that is mounted with nodev
    /// [default: /srv/jailer]
    #[arg(long, value_name = "DIR", requires = "jailer")]
    chroot_base_dir: Option<PathBuf>,

    /// Put each jailed Firecracker into a cgroup with this setting, such as memory.max=1073741824. May be given more than
    /// once.
    #[arg(long, value_name = "FILE=VALUE", requires = "jailer")]
    cgroup: Vec<String>,
}

/// A jailer, and its settings for all jails of a run.
#[derive(Clone, Debug)]
pub(crate) struct Jailer {
    path: PathBuf,
    uid: u32,
    gid: u32,
    base: PathBuf,
    cgroups: Vec<String>,
}

/// The place of one Firecracker that is to be jailed.
#[derive(Debug)]
pub(crate) struct Jail {
    folder: PathBuf,
    program: PathBuf,
}

/// A jailed Firecracker. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct JailedProcess {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    /// Set once it has been waited for.
    ended: Option<ExitStatus>,
}

impl JailerArgs {
    /// The jailer, if one is asked for. It is there, and may be used.
    pub(crate) fn find(&self) -> Result<Option<Jailer>> {
        let (Some(path), Some(uid), Some(gid)) = (&self.jailer, self.uid, self.gid) else {
            return Ok(None);
        };
        ensure!(geteuid().is_root(), "the jailer has to be started by root");
        let path = path
            .canonicalize()
            .with_context(|| format!("there is no jailer at {}", path.display()))?;
        ensure!(
            path.is_file() && access(&path, Access::EXEC_OK).is_ok(),
            "{} is not a file that this user may execute",
            path.display()
        );
        let base = self.chroot_base_dir.clone().unwrap_or_else(|| CHROOT_BASE.into());
        fs::create_dir_all(&base).with_context(|| format!("cannot make {}", base.display()))?;
        // The jailer ends once it has started Firecracker, which becomes our child by this.
        set_child_subreaper(Some(getpid())).context("cannot become a subreaper")?;
        Ok(Some(Jailer {
            path,
            uid,
            gid,
            base,
            cgroups: self.cgroup.clone(),
        }))
    }
}

impl Jailer {
    /// Where the folder of a run is to be.
    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    pub(crate) fn gid(&self) -> u32 {
        self.gid
    }

    /// Makes the root directory of a jail, and what Firecracker finds there.
    pub(crate) fn prepare(&self, firecracker: &Path, folder: &Path, vmstate: &Path) -> io::Result<Jail> {
        let jail = Jail {
            folder: folder.to_owned(),
            program: firecracker.to_owned(),
        };
        // Copying a pipe would never come to an end.
        if !fs::metadata(vmstate)?.is_file() {
            return Err(io::Error::other("the state file is not a regular file"));
        }
        fs::create_dir_all(jail.root())?;
        let copy = jail.root().join(VMSTATE);
        fs::copy(vmstate, &copy)?;
        chown(&copy, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        Ok(jail)
    }

    /// The command line of the jailer, to which the arguments of Firecracker are to be added.
    pub(crate) fn command(&self, jail: &Jail) -> io::Result<Command> {
        // BASE/PROGRAM/ID
        let base = jail.folder.parent().and_then(Path::parent).unwrap_or(&jail.folder);
        let mut command = exec::command(&self.path);
        command
            .arg("--id")
            .arg(jail.folder.file_name().unwrap_or_default())
            .arg("--exec-file")
            .arg(&jail.program)
            .args(["--uid", &self.uid.to_string(), "--gid", &self.gid.to_string()])
            .arg("--chroot-base-dir")
            .arg(base)
            .arg("--new-pid-ns");
        if !self.cgroups.is_empty() {
            let version = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
                "2"
            } else {
                "1"
            };
            command.args(["--cgroup-version", version]);
            // Of this run alone, so that it can be removed.
            command.arg("--parent-cgroup").arg(base.file_name().unwrap_or_default());
            for setting in &self.cgroups {
                command.args(["--cgroup", setting]);
            }
        }
        command
            .arg("--")
            .stdin(Stdio::null())
            .stdout(File::create(jail.stdout())?)
            .stderr(File::create(jail.stderr())?);
        Ok(command)
    }
}

impl Jail {
    /// The root directory of the jail, as the host sees it.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join(ROOT)
    }

    /// Where the daemon is to put the socket for `uffd`.
    pub(crate) fn uffd_socket(&self) -> PathBuf {
        self.root().join(UFFD_SOCKET)
    }

    /// Where the daemon is to put the memory file for `file`.
    pub(crate) fn mem_file(&self) -> PathBuf {
        self.root().join(MEM_FILE)
    }

    /// What Firecracker prints, its log too.
    pub(crate) fn stdout(&self) -> PathBuf {
        self.folder.join(STDOUT)
    }

    pub(crate) fn stderr(&self) -> PathBuf {
        self.folder.join(STDERR)
    }

    /// The state file, as Firecracker sees it.
    pub(crate) fn vmstate() -> &'static Path {
        Path::new("/vmstate")
    }

    /// The path that Firecracker knows what is at `path` by.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(self.root()) {
            Ok(inside) => Path::new("/").join(inside),
            Err(_) => path.to_owned(),
        }
    }

    /// The Firecracker that the jailer has started here.
    pub(crate) fn process(&self) -> io::Result<JailedProcess> {
        let mut name = self.program.file_name().unwrap_or_default().to_owned();
        name.push(".pid");
        let pid = fs::read_to_string(self.root().join(name))?;
        let pid = pid.trim().parse().map_err(io::Error::other)?;
        let process = JailedProcess::open(pid)?;
        // It is our child, which nobody else waits for: it is this one.
        if root_of(pid)? != identity(&fs::metadata(self.root())?) {
            return Err(io::Error::other(
                "the process that the jailer has started is not in the jail",
            ));
        }
        Ok(process)
    }
}

impl JailedProcess {
    fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK)?;
        #[expect(
            deprecated,
            reason = "sound for an OwnedFd; what replaces it is unsafe, for types that may change their descriptor"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(Self {
            pid,
            pidfd,
            ended: None,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until it has ended. May be dropped and called again.
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        // A pidfd stays readable.
        drop(self.pidfd.readable().await?);
        let status = waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), WaitIdOptions::EXITED)?;
        let status = status.ok_or(io::ErrorKind::WouldBlock)?;
        // As wait(2) tells it.
        let exited = status.exit_status().map(|code| code << 8);
        let status = ExitStatus::from_raw(exited.or(status.terminating_signal()).unwrap_or_default());
        self.ended = Some(status);
        Ok(status)
    }

    /// Kills it and waits for its end.
    pub(crate) async fn kill(&mut self) -> io::Result<()> {
        self.signal_end()?;
        self.wait().await.map(drop)
    }

    fn signal_end(&self) -> io::Result<()> {
        if self.ended.is_some() {
            return Ok(());
        }
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for JailedProcess {
    fn drop(&mut self) {
        // It is our child: the kernel has no reason to refuse.
        let _ = self.signal_end();
    }
}

/// What an operator has to do about a failed load, where that can be told.
pub(crate) fn advice(error: &str) -> &'static str {
    if error.contains("UFFD object") {
        "\n  the jailed user cannot create a userfaultfd: the host needs /dev/userfaultfd when the jailer is started (Linux 6.1, \
         and a jailer that puts it into the jail), or `sysctl -w vm.unprivileged_userfaultfd=1`"
    } else if error.contains("Permission denied") {
        "\n  the jailed user cannot open a file: the memory file keeps the owner and mode of the template, which has to be \
         readable for that user"
    } else {
        ""
    }
}

/// Kills all processes whose root directory is that of a jail in this folder, and waits for their end.
///
/// # Errors
///
/// Some live on.
pub(crate) fn kill_inside(jails: &Path) -> io::Result<()> {
    let entries = fs::read_dir(jails).into_iter().flatten().flatten();
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
        let is_inside = || root_of(pid).is_ok_and(|root| roots.contains_key(&root));
        if !is_inside() {
            continue;
        }
        let Some(pidfd) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            continue;
        };
        // Looked at again, now that it cannot be another process any more.
        if is_inside() && pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
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

/// Removes the cgroups of a run, which are named as its folder, once all in them have ended.
pub(crate) fn remove_cgroups(run: &OsStr) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let cgroups = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        fields.next()?.starts_with("cgroup").then_some(path)
    });
    for mount in cgroups {
        let parent = Path::new(mount).join(run);
        let children = fs::read_dir(&parent).into_iter().flatten().flatten();
        for child in children.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove_cgroup(&child.path())?;
        }
        remove_cgroup(&parent)?;
    }
    Ok(())
}

fn remove_cgroup(path: &Path) -> io::Result<()> {
    let until = std::time::Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(path) {
            // The kernel is not done with the processes that have ended.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && std::time::Instant::now() < until => {
                std::thread::sleep(PACE);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            done => return done,
        }
    }
}

/// What tells the root directory of a process from all others.
fn root_of(pid: i32) -> io::Result<(u64, u64)> {
    Ok(identity(&fs::metadata(format!("/proc/{pid}/root"))?))
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}
