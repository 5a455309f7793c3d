//! VMMs known by pid, and the processes that map a file.

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

/// Why a process cannot be used as a VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum VmmError {
    /// No process has this pid, or it has exited.
    #[error("there is no process {pid}, or it has exited")]
    NoProcess {
        /// The pid.
        pid: i32,
    },
    /// The pid is that of pagecast, the init process, a thread or a kernel thread.
    #[error("the pid {pid} is not a VMM but {what}")]
    NoVmm {
        /// The pid.
        pid: i32,
        /// The kind of process.
        what: &'static str,
    },
    /// The daemon may not kill it, so it could not keep it from reading wrong bytes.
    #[error(
        "the process {pid} belongs to another user, and pagecast must be able to kill the VMM of a template that changes; \
         run pagecast as the user of the VMM, or with CAP_KILL"
    )]
    NotOurs {
        /// The pid.
        pid: i32,
    },
    /// Any other error.
    #[error("failed to look at the process {pid}: {source}")]
    Io {
        /// The pid.
        pid: i32,
        /// The cause.
        source: io::Error,
    },
}

/// The saved identity of a process, which tells it from other processes with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedVmm {
    /// Its pid.
    pub(crate) pid: i32,
    /// Its start time, in clock ticks since the boot of the host.
    pub(crate) start_time: u64,
    /// The id of that boot (`/proc/sys/kernel/random/boot_id`).
    pub(crate) boot_id: String,
}

/// A VMM known by its pid. Holds two file descriptors, so that a reused pid is not mistaken for it.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    pidfd: PidFd,
    process: Process,
    start_time: u64,
}

impl VmmProcess {
    /// Opens the process that has this pid now.
    ///
    /// # Errors
    ///
    /// [`VmmError`]: there is none, it cannot be a VMM, or the daemon may not kill it.
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

    /// Opens a saved process; `None` if it has exited.
    ///
    /// # Errors
    ///
    /// It is or may be alive, but cannot be inspected, or the daemon may not kill it.
    pub(crate) fn find(saved: &SavedVmm) -> Result<Option<Self>, VmmError> {
        let pid = saved.pid;
        // No process of an earlier boot is alive, and its start time means nothing now.
        if boot_id().map_err(|source| VmmError::Io { pid, source })? != saved.boot_id {
            return Ok(None);
        }
        match Self::look(pid) {
            Ok((process, _)) if process.start_time == saved.start_time => {
                process.check_may_kill()?;
                Ok(Some(process))
            }
            // Another process, a thread or none has the pid by now.
            Ok(_) | Err(VmmError::NoProcess { .. } | VmmError::NoVmm { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens any process, and returns it with its kernel flags.
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
                    // The errno depends on the version of Linux.
                    Errno::INVAL | Errno::NOENT => VmmError::NoVmm { pid, what: "a thread" },
                    errno => VmmError::Io {
                        pid,
                        source: errno.into(),
                    },
                });
            }
        };
        let looked = Process::new(pid).and_then(|process| Ok((process.stat()?, process)));
        // If it is still alive, the stat above was of this process.
        if pidfd.has_exited() {
            return Err(gone);
        }
        let (stat, process) = looked.map_err(|error| match error {
            // It is alive, so `/proc` hides it (`hidepid`).
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
        // Not `Stat::flags`, which fails for unknown flags.
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

    /// Returns its identity, to be saved.
    ///
    /// # Errors
    ///
    /// The id of this boot cannot be read.
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

    /// Sends SIGKILL. Succeeds if it has died already.
    ///
    /// # Errors
    ///
    /// The daemon may no longer kill it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.pidfd
            .kill()
            .map_err(|errno| io::Error::from_raw_os_error(errno.get()))
    }

    /// Waits up to `patience` for it to exit. Returns `true` if it has.
    pub(crate) fn wait_exited(&self, patience: Duration) -> bool {
        // A patience out of range does not occur.
        let patience = Timespec::try_from(patience).unwrap_or_default();
        let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut poll, Some(&patience)), Ok(ready) if ready > 0)
    }

    /// Returns its current memory use; `None` if it has exited, or may not be inspected.
    pub(crate) fn memory(&self) -> Option<ForkMemory> {
        process_memory::of_process(&self.process)
    }

    /// Returns `true` if a userfaultfd handles page faults of its memory (`um` in `VmFlags`, `proc_pid_smaps(5)`), or
    /// if that cannot be read. A complete VMM has no such memory left.
    pub(crate) fn needs_server(&self) -> bool {
        read_of_memory(&self.process, "smaps").map_or(true, |smaps| proc_files::has_flag(&smaps, "um"))
    }

    /// Returns the paths by which it has opened this file that it maps; empty if it does not map it. In another mount
    /// namespace, such as in Firecracker's jailer, a path starts at the root of that. A removed path ends in
    /// ` (deleted)`. The kernel escapes paths: compare them with [`path_in_maps`](proc_files::path_in_maps).
    ///
    /// # Errors
    ///
    /// It has exited, or may map the file and cannot be inspected.
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
    /// The same as a raw descriptor, such as for `tokio::io::unix::AsyncFd`.
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// A process that maps a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Its pid.
    pub(crate) pid: i32,
    /// The file.
    pub(crate) file: InodeId,
    /// The paths by which it has opened the file; see [`VmmProcess::mapped_paths`].
    pub(crate) paths: Vec<PathBuf>,
}

/// A process whose mappings cannot be read, so it may map any file.
#[derive(Debug)]
pub(crate) struct Unreadable {
    /// Its pid.
    pub(crate) pid: i32,
    /// Total size of its mappings in bytes. It cannot map a larger file whole, as a VMM does.
    pub(crate) mapped_bytes: u64,
    /// Why its mappings cannot be read.
    pub(crate) why: io::Error,
}

/// The processes that map a set of files.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    /// Processes that map one of the files. One that maps two of them is listed twice.
    pub(crate) found: Vec<Holder>,
    /// Processes that may map them. Without the init process, kernel threads, and processes that the daemon may neither
    /// inspect nor kill, which cannot be a VMM of it (see [`VmmError::NotOurs`]).
    pub(crate) unreadable: Vec<Unreadable>,
}

impl Holders {
    /// Returns the unreadable processes that may map a whole template of `bytes` bytes.
    pub(crate) fn may_hold(&self, bytes: u64) -> impl Iterator<Item = &Unreadable> {
        self.unreadable
            .iter()
            .filter(move |process| process.mapped_bytes >= bytes)
    }
}

/// Finds all other processes of this host that map one of these files. Reads `maps` of each process once, which takes
/// about 0.2 ms for a hundred mappings.
///
/// # Errors
///
/// There is no `/proc`.
pub(crate) fn holders(files: &BTreeSet<InodeId>) -> io::Result<Holders> {
    #[cfg(test)]
    tests::may_panic(files);
    let mut holders = Holders::default();
    for process in procfs::process::all_processes().map_err(io_error)? {
        // A process that exits meanwhile no longer maps any file.
        let Ok(process) = process else { continue };
        // This process maps templates too, to warm them, and is no VMM.
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

/// Returns those of these files that a process maps.
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

/// Describes a process whose mappings cannot be read; `None` if it cannot be a VMM.
fn unreadable(process: &Process, why: io::Error) -> Option<Unreadable> {
    let pid = process.pid();
    match VmmProcess::open(pid) {
        Ok(_) | Err(VmmError::Io { .. }) => {}
        Err(VmmError::NoProcess { .. } | VmmError::NoVmm { .. } | VmmError::NotOurs { .. }) => return None,
    }
    Some(Unreadable {
        pid,
        // Every user may read this of every process.
        mapped_bytes: process.stat().map_or(u64::MAX, |stat| stat.vsize),
        why,
    })
}

/// Reads a file about a process's memory from its folder in `/proc`. Empty if the process has no memory, or exits.
///
/// If the first thread has ended while others run, its file is empty, and that of another thread is read.
fn read_of_memory(process: &Process, name: &str) -> io::Result<Vec<u8>> {
    let bytes = read(process, Path::new(name))?;
    if !bytes.is_empty() {
        return Ok(bytes);
    }
    // An exited process has no folder of threads.
    for task in process.tasks().into_iter().flatten().flatten() {
        let bytes = read(process, &Path::new("task").join(task.tid.to_string()).join(name))?;
        if !bytes.is_empty() {
            return Ok(bytes);
        }
    }
    Ok(Vec::new())
}

/// Reads a file of a process's folder. Empty if the process or thread has exited, or has no memory.
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

/// Returns the mappings of this file in a process.
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

/// Returns `true` if a mapping is one of this file.
///
/// # Errors
///
/// The mapping may be of this file, and cannot be inspected.
fn is_of(process: &Process, mapping: &Mapping<'_>, file: InodeId) -> io::Result<bool> {
    if mapping.inode != file.inode {
        return Ok(false);
    }
    let (major, minor) = mapping.device;
    let device = rustix::fs::makedev(major, minor);
    // Btrfs and overlays show another device in `maps` than `fstat(2)` does. Neither is the device of a disk.
    let may_differ = major == 0 && rustix::fs::major(file.device) == 0;
    if device == file.device || !may_differ {
        return Ok(device == file.device);
    }
    // So the mapped file itself is checked, which needs `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
    let path = format!(
        "/proc/{}/map_files/{:x}-{:x}",
        process.pid(),
        mapping.start,
        mapping.end
    );
    match rustix::fs::stat(path) {
        Ok(of_map) => Ok(InodeId::of_stat(&of_map) == file),
        // The file was unmapped meanwhile.
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns the paths of these mappings. The kernel shows mappings without a path by a name in brackets.
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
