//! A VMM that is known by its pid, and which processes map a file.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pagecast::proc_files::{self, Mapping};
use pagecast_client::fork::ForkMemory;
use pagecast_uffd::PidFd;
use procfs::ProcError;
use procfs::process::{Process, StatFlags};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::time::Timespec;
use serde::{Deserialize, Serialize};

use crate::inode::InodeId;
use crate::process_memory;

/// A process cannot be taken for a VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum VmmError {
    /// No process has this pid, or it has exited.
    #[error("there is no process {pid}, or it has exited")]
    NoProcess {
        /// The pid.
        pid: i32,
    },
    /// It is the pid of pagecast, of the init process, a thread or the kernel.
    #[error("the pid {pid} is not a VMM but {what}")]
    NoVmm {
        /// The pid.
        pid: i32,
        /// What it is.
        what: &'static str,
    },
    /// We may not kill it, so we could not keep it from reading wrong bytes.
    #[error(
        "the process {pid} belongs to another user, and pagecast must be able to kill the VMM of a template that changes; \
         run pagecast as the user of the VMM, or with CAP_KILL"
    )]
    NotOurs {
        /// The pid.
        pid: i32,
    },
    /// Anything else.
    #[error("failed to look at the process {pid}: {source}")]
    Io {
        /// The pid.
        pid: i32,
        /// Why.
        source: io::Error,
    },
}

/// What tells a process from all others that have had its pid: to be persisted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedVmm {
    /// Its pid.
    pub(crate) pid: i32,
    /// When it was started, in clock ticks since the host was.
    pub(crate) start_time: u64,
    /// Which start of the host that is (`/proc/sys/kernel/random/boot_id`).
    pub(crate) boot_id: String,
}

/// A VMM that is known by its pid. Holds two file descriptors, so that it is never another process.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pidfd: PidFd,
    process: Process,
    start_time: u64,
}

impl VmmProcess {
    /// The process that has this pid now.
    ///
    /// # Errors
    ///
    /// [`VmmError`]: there is none, it cannot be a VMM, or is not ours to kill.
    pub(crate) fn open(pid: i32) -> Result<Self, VmmError> {
        let no_vmm = |what| VmmError::NoVmm { pid, what };
        if u32::try_from(pid).is_ok_and(|pid| pid == std::process::id()) {
            return Err(no_vmm("pagecast itself"));
        }
        if pid == 1 {
            return Err(no_vmm("the init process"));
        }
        let (process, flags) = Self::look(pid)?;
        if flags & StatFlags::PF_KTHREAD.bits() != 0 {
            return Err(no_vmm("a thread of the kernel"));
        }
        process.check_may_kill()?;
        Ok(process)
    }

    /// The process that was saved; `None` where it has exited.
    ///
    /// # Errors
    ///
    /// It lives, or may do so, but cannot be looked at or is not ours to kill.
    pub(crate) fn find(saved: &SavedVmm) -> Result<Option<Self>, VmmError> {
        let pid = saved.pid;
        // Start times of another start of the host say nothing, and none of its processes is alive.
        if boot_id().map_err(|source| VmmError::Io { pid, source })? != saved.boot_id {
            return Ok(None);
        }
        match Self::look(pid) {
            Ok((process, _)) if process.start_time == saved.start_time => {
                process.check_may_kill()?;
                Ok(Some(process))
            }
            // Its pid is another process's by now, a thread's, or nobody's.
            Ok(_) | Err(VmmError::NoProcess { .. } | VmmError::NoVmm { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Any process, and its flags as the kernel has them.
    fn look(pid: i32) -> Result<(Self, u32), VmmError> {
        let gone = VmmError::NoProcess { pid };
        if pid <= 0 {
            return Err(gone);
        }
        let pidfd = match PidFd::open(pid) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                return Err(match Errno::from_raw_os_error(errno.get()) {
                    Errno::SRCH => gone,
                    // Which of them Linux says depends on its version.
                    Errno::INVAL | Errno::NOENT => VmmError::NoVmm { pid, what: "a thread" },
                    errno => VmmError::Io {
                        pid,
                        source: errno.into(),
                    },
                });
            }
        };
        let looked = Process::new(pid).and_then(|process| Ok((process.stat()?, process)));
        // It has not exited after it was looked at, so it was this one that was looked at.
        if pidfd.has_exited() {
            return Err(gone);
        }
        let (stat, process) = looked.map_err(|error| match error {
            // It lives, so it is hidden (`hidepid`).
            ProcError::NotFound(_) => VmmError::NotOurs { pid },
            error => VmmError::Io {
                pid,
                source: io_error(error),
            },
        })?;
        let looked = Self {
            pidfd,
            process,
            start_time: stat.starttime,
        };
        // Not `Stat::flags`, which fails for flags that it does not know.
        Ok((looked, stat.flags))
    }

    fn check_may_kill(&self) -> Result<(), VmmError> {
        let pid = self.pid();
        self.pidfd
            .may_kill()
            .map_err(|errno| match Errno::from_raw_os_error(errno.get()) {
                Errno::PERM => VmmError::NotOurs { pid },
                errno => VmmError::Io {
                    pid,
                    source: errno.into(),
                },
            })
    }

    /// What to persist of it.
    ///
    /// # Errors
    ///
    /// The host does not say which of its starts this is.
    pub(crate) fn saved(&self) -> io::Result<SavedVmm> {
        Ok(SavedVmm {
            pid: self.pid(),
            start_time: self.start_time,
            boot_id: boot_id()?,
        })
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Sends SIGKILL. No error where it has died already.
    ///
    /// # Errors
    ///
    /// It is no longer ours to kill.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.pidfd
            .kill()
            .map_err(|errno| io::Error::from_raw_os_error(errno.get()))
    }

    /// Waits until it has exited, but no longer than `patience`; whether it has.
    pub(crate) fn wait_exited(&self, patience: Duration) -> bool {
        // Far beyond the patience of anybody.
        let patience = Timespec::try_from(patience).unwrap_or_default();
        let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut poll, Some(&patience)), Ok(ready) if ready > 0)
    }

    /// What its memory costs now; `None` where it has exited, or is not ours to look at.
    pub(crate) fn memory(&self) -> Option<ForkMemory> {
        process_memory::of_process(&self.process)
    }

    /// Whether page faults of its memory go to somebody who serves them (`um` in `VmFlags`, `proc_pid_smaps(5)`): one that is
    /// complete has none left that do. `true` where that cannot be told.
    pub(crate) fn needs_server(&self) -> bool {
        read_of_memory(&self.process, "smaps").map_or(true, |smaps| proc_files::has_flag(&smaps, "um"))
    }

    /// By which paths it has opened this file that it maps; empty where it does not. Where it runs in another mount
    /// namespace, as in Firecracker's jailer, a path starts at the root of that. It ends in ` (deleted)` where it is gone, and
    /// is as the kernel writes it: compare it with [`path_in_maps`](proc_files::path_in_maps).
    ///
    /// # Errors
    ///
    /// It has exited, or may map the file and cannot be looked at.
    pub(crate) fn mapped_paths(&self, file: InodeId) -> io::Result<Vec<PathBuf>> {
        let maps = read_of_memory(&self.process, "maps")?;
        Ok(paths(&mapped(&self.process, &maps, file)?))
    }
}

impl AsFd for VmmProcess {
    /// Readable once it has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl AsRawFd for VmmProcess {
    /// The same, for who waits by number, such as `tokio::io::unix::AsyncFd`.
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// A process that maps a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Its pid.
    pub(crate) pid: i32,
    /// Which file.
    pub(crate) file: InodeId,
    /// By which paths it has opened the file; see [`VmmProcess::mapped_paths`].
    pub(crate) paths: Vec<PathBuf>,
}

/// A process that may map any file: nobody can tell.
#[derive(Debug)]
pub(crate) struct Unreadable {
    /// Its pid.
    pub(crate) pid: i32,
    /// How much it maps, in bytes: it does not map a larger file whole, as a VMM does.
    pub(crate) mapped_bytes: u64,
    /// Why its mappings cannot be read.
    pub(crate) why: io::Error,
}

/// Which processes map some files.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    /// Those that do. One that maps two of the files is there twice.
    pub(crate) found: Vec<Holder>,
    /// Those that may. Not in it: the init process, threads of the kernel, and processes that we may neither look at nor kill,
    /// which pagecast takes for no VMM (see [`VmmError::NotOurs`]).
    pub(crate) unreadable: Vec<Unreadable>,
}

impl Holders {
    /// Those that may be the VMM of a template of `bytes` bytes, though nobody can tell.
    pub(crate) fn may_hold(&self, bytes: u64) -> impl Iterator<Item = &Unreadable> {
        self.unreadable
            .iter()
            .filter(move |process| process.mapped_bytes >= bytes)
    }
}

/// All other processes of this host that map one of these files. Reads `maps` of each process once, which takes some 0.2 ms for
/// one with a hundred mappings.
///
/// # Errors
///
/// There is no `/proc`.
pub(crate) fn holders(files: &BTreeSet<InodeId>) -> io::Result<Holders> {
    #[cfg(test)]
    tests::may_panic(files);
    let mut holders = Holders::default();
    for process in procfs::process::all_processes().map_err(io_error)? {
        // A process that exits meanwhile maps nothing any more.
        let Ok(process) = process else { continue };
        // We map templates too, to have them in memory, and are nobody's VMM.
        if process.pid().cast_unsigned() == std::process::id() {
            continue;
        }
        match holdings(&process, files) {
            Ok(found) => holders.found.extend(found),
            Err(why) => holders.unreadable.extend(unreadable(&process, why)),
        }
    }
    Ok(holders)
}

/// Which of these files a process maps.
fn holdings(process: &Process, files: &BTreeSet<InodeId>) -> io::Result<Vec<Holder>> {
    let maps = read_of_memory(process, "maps")?;
    let mut found = Vec::new();
    for &file in files {
        let maps = mapped(process, &maps, file)?;
        if !maps.is_empty() {
            found.push(Holder {
                pid: process.pid(),
                file,
                paths: paths(&maps),
            });
        }
    }
    Ok(found)
}

/// A process whose mappings cannot be read, if it can be a VMM.
fn unreadable(process: &Process, why: io::Error) -> Option<Unreadable> {
    let pid = process.pid();
    match VmmProcess::open(pid) {
        Ok(_) | Err(VmmError::Io { .. }) => {}
        Err(VmmError::NoProcess { .. } | VmmError::NoVmm { .. } | VmmError::NotOurs { .. }) => return None,
    }
    Some(Unreadable {
        pid,
        // Everybody may know this of every process.
        mapped_bytes: process.stat().map_or(u64::MAX, |stat| stat.vsize),
        why,
    })
}

/// A file of a process's folder that tells of its memory; nothing if the process has none, or exits.
///
/// Where the first thread of a process has ended, the file tells nothing, while other threads use the memory: theirs does.
fn read_of_memory(process: &Process, name: &str) -> io::Result<Vec<u8>> {
    let bytes = read(process, Path::new(name))?;
    if !bytes.is_empty() {
        return Ok(bytes);
    }
    // Neither has a folder of threads once it is gone.
    for task in process.tasks().into_iter().flatten().flatten() {
        let bytes = read(process, &Path::new("task").join(task.tid.to_string()).join(name))?;
        if !bytes.is_empty() {
            return Ok(bytes);
        }
    }
    Ok(Vec::new())
}

/// A file of a process's folder; nothing if the process or thread has exited, or has no memory.
fn read(process: &Process, name: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let opened = process.open_relative(name).map_err(io_error);
    match opened.and_then(|mut file| file.read_to_end(&mut bytes)) {
        Ok(_) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Those mappings of a process that are of this file.
///
/// # Errors
///
/// A mapping cannot be read, so it may be of this file.
fn mapped<'a>(process: &Process, maps: &'a [u8], file: InodeId) -> io::Result<Vec<Mapping<'a>>> {
    let mut found = Vec::new();
    for mapping in proc_files::mappings(maps) {
        let mapping = mapping.map_err(io::Error::other)?;
        if is_of(process, &mapping, file)? {
            found.push(mapping);
        }
    }
    Ok(found)
}

/// Whether a mapping is one of this file.
///
/// # Errors
///
/// It may be, and cannot be looked at.
fn is_of(process: &Process, mapping: &Mapping<'_>, file: InodeId) -> io::Result<bool> {
    if mapping.inode != file.inode {
        return Ok(false);
    }
    let (major, minor) = mapping.device;
    let device = rustix::fs::makedev(major, minor);
    // Btrfs and overlays show another device in `maps` than `fstat(2)` does. Neither is that of a disk.
    let may_differ = major == 0 && rustix::fs::major(file.device) == 0;
    if device == file.device || !may_differ {
        return Ok(device == file.device);
    }
    // So the mapped file itself has to be asked, which takes `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
    let path = format!(
        "/proc/{}/map_files/{:x}-{:x}",
        process.pid(),
        mapping.start,
        mapping.end
    );
    match rustix::fs::stat(path) {
        Ok(of_map) => Ok(InodeId::of_stat(&of_map) == file),
        // Unmapped meanwhile.
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The paths of these mappings. What has none is shown by a name in brackets.
fn paths(mappings: &[Mapping<'_>]) -> Vec<PathBuf> {
    let mut paths: Vec<_> = mappings
        .iter()
        .filter(|mapping| mapping.path.starts_with(b"/"))
        .map(|mapping| Path::new(OsStr::from_bytes(mapping.path)).to_owned())
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

fn boot_id() -> io::Result<String> {
    let id = procfs::sys::kernel::random::boot_id().map_err(io_error)?;
    Ok(id.trim().to_owned())
}

fn io_error(error: ProcError) -> io::Error {
    match error {
        ProcError::PermissionDenied(_) => io::ErrorKind::PermissionDenied.into(),
        ProcError::NotFound(_) => io::ErrorKind::NotFound.into(),
        ProcError::Io(error, _) => error,
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
