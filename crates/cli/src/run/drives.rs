//! Files that microVMs have open for writing, and that no two of them may share.
//!
//! A snapshot names the files of its drives. Each microVM that is restored from it opens the same files. If two write
//! to one file system, each with a cache of its own, they corrupt it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, Stat, stat};
use rustix::process::getpid;

use pagecast_command::harmless;

/// Number of writers that an error names.
const NAMED: usize = 3;

/// The identity of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FileId {
    /// A regular file.
    Regular {
        /// Number of its device.
        device: u64,
        /// Number of its inode.
        inode: u64,
    },
    /// A block device, under any name.
    Block {
        /// Number of the device.
        device: u64,
    },
}

/// The files that a process has open for writing, each with the path that it was opened by.
pub(crate) type WritableFiles = BTreeMap<FileId, PathBuf>;

/// A microVM that has loaded its snapshot and is paused.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) id: String,
    pub(crate) pid: i32,
    pub(crate) writable: WritableFiles,
}

/// A file that more than one microVM would write to.
#[derive(Debug, thiserror::Error)]
#[error(
    "no microVM was resumed: {} is open for writing in {}, and a file system that two write to is corrupted. Give each microVM a \
     file of its own between load and resume (`PATCH /drives/{{id}}` with `path_on_host`), which `pagecast run` does not \
     do; or make the snapshot of a microVM whose drive is read-only; or run one at a time (-n 1)",
    harmless(&path.to_string_lossy()),
    named(writers)
)]
pub(crate) struct SharedDrive {
    path: PathBuf,
    /// Names of the writers, two at least.
    writers: Vec<String>,
}

fn named(all: &[String]) -> String {
    let first = all.get(..NAMED).unwrap_or(all).join(", ");
    match all.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// The regular files and block devices that a process has open for writing.
///
/// # Errors
///
/// There is no such process, or this user may not look into it.
pub(crate) fn open_for_writing(pid: i32) -> io::Result<WritableFiles> {
    let mut files = WritableFiles::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        match writable_file(pid, &entry.path(), &entry.file_name()) {
            Ok(Some((id, path))) => {
                files.insert(id, path);
            }
            Ok(None) => {}
            // Closed since the folder was read.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(files)
}

/// The file behind a file descriptor, if the descriptor is open for writing.
fn writable_file(pid: i32, link: &Path, number: &OsString) -> io::Result<Option<(FileId, PathBuf)>> {
    let path = fs::read_link(link)?;
    // All files of such a kind share one inode.
    if path.as_os_str().as_bytes().starts_with(b"anon_inode:") {
        return Ok(None);
    }
    let Some(id) = FileId::of(&stat(link)?) else {
        return Ok(None);
    };
    let info = fs::read(Path::new("/proc").join(pid.to_string()).join("fdinfo").join(number))?;
    let flags =
        flags(&info).ok_or_else(|| io::Error::other("the kernel does not show the flags of a file descriptor"))?;
    Ok(is_writable(flags).then_some((id, path)))
}

/// The flags in the text of `/proc/PID/fdinfo/N`, see `proc_pid_fdinfo(5)`.
fn flags(info: &[u8]) -> Option<OFlags> {
    let line = info
        .split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"flags:"))?;
    let octal = std::str::from_utf8(line).ok()?.trim();
    Some(OFlags::from_bits_retain(u32::from_str_radix(octal, 8).ok()?))
}

fn is_writable(flags: OFlags) -> bool {
    // The access mode is a number, not a set of flags: 0 is read-only.
    let mode = flags & OFlags::RWMODE;
    (mode == OFlags::WRONLY || mode == OFlags::RDWR) && !flags.contains(OFlags::PATH)
}

impl FileId {
    /// `None` if it is neither a regular file nor a block device.
    fn of(stat: &Stat) -> Option<Self> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Some(Self::Regular {
                device: stat.st_dev,
                inode: stat.st_ino,
            }),
            FileType::BlockDevice => Some(Self::Block { device: stat.st_rdev }),
            _ => None,
        }
    }
}

/// Looks for a file that two of these microVMs, or one of them and another process, have open for writing. Processes
/// that this user may not look into are left out.
///
/// # Errors
///
/// [`SharedDrive`] for the first such file.
pub(crate) fn refuse_shared(loaded: &[Loaded]) -> Result<(), SharedDrive> {
    let mut users: BTreeMap<FileId, (&Path, Vec<String>)> = BTreeMap::new();
    for vm in loaded {
        for (id, path) in &vm.writable {
            let (_, writers) = users.entry(*id).or_insert_with(|| (path, Vec::new()));
            writers.push(vm.id.clone());
        }
    }
    // Looking at all processes takes long on a large host, and most snapshots have no writable drive.
    if !users.is_empty() && users.values().all(|(_, writers)| writers.len() == 1) {
        let ours = loaded.iter().map(|vm| vm.pid).collect();
        for (pid, files) in others(&ours) {
            for id in files.keys() {
                if let Some((_, writers)) = users.get_mut(id) {
                    writers.push(format!("process {pid}"));
                }
            }
        }
    }
    match users.into_values().find(|(_, writers)| writers.len() > 1) {
        None => Ok(()),
        Some((path, writers)) => Err(SharedDrive {
            path: path.to_owned(),
            writers,
        }),
    }
}

/// The files that all other processes have open for writing. Left out: processes that end meanwhile, and those that
/// this user may not look into.
fn others(ours: &BTreeSet<i32>) -> impl Iterator<Item = (i32, WritableFiles)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| *pid != getpid().as_raw_nonzero().get() && !ours.contains(pid))
        .filter_map(|pid| Some((pid, open_for_writing(pid).ok()?)))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use rustix::fs::fstat;

    use super::*;

    fn own() -> i32 {
        getpid().as_raw_nonzero().get()
    }

    fn vm(id: &str, writable: WritableFiles) -> Loaded {
        Loaded {
            id: id.to_owned(),
            pid: own(),
            writable,
        }
    }

    fn only(file: &File, path: &Path) -> WritableFiles {
        let id = FileId::of(&fstat(file).unwrap()).unwrap();
        [(id, path.to_owned())].into()
    }

    #[test]
    fn only_what_can_be_written_counts() {
        let folder = tempfile::tempdir().unwrap();
        let [read, written, both] = ["read", "written", "both"].map(|name| folder.path().join(name));
        for path in [&read, &written, &both] {
            fs::write(path, "").unwrap();
        }
        let files = [
            File::open(&read).unwrap(),
            OpenOptions::new().append(true).open(&written).unwrap(),
            OpenOptions::new().read(true).write(true).open(&both).unwrap(),
        ];
        let found = open_for_writing(own()).unwrap();
        let found = |file: &File| found.get(&FileId::of(&fstat(file).unwrap()).unwrap());
        assert_eq!(files.each_ref().map(found), [None, Some(&written), Some(&both)]);
    }

    #[test]
    fn a_name_that_is_not_utf_8_hides_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(std::ffi::OsStr::from_bytes(b"\xff\nSYSV"));
        let file = File::create(&path).unwrap();
        let id = FileId::of(&fstat(&file).unwrap()).unwrap();
        assert_eq!(open_for_writing(own()).unwrap().get(&id), Some(&path));
    }

    #[test]
    fn sockets_pipes_and_devices_of_other_kinds_are_no_files() {
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let _null = OpenOptions::new().write(true).open("/dev/null").unwrap();
        for path in open_for_writing(own()).unwrap().values() {
            let name = path.to_string_lossy();
            assert!(name.starts_with('/') && name != "/dev/null", "{name}");
        }
    }

    #[test]
    fn two_names_of_one_file_are_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
        let file = File::create(&first).unwrap();
        fs::hard_link(&first, &second).unwrap();
        let error = refuse_shared(&[vm("one", only(&file, &first)), vm("two", only(&file, &second))]).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("/first is open for writing in one, two, and"), "{said}");
    }

    #[test]
    fn files_of_their_own_are_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
        let files = [File::create(&first).unwrap(), File::create(&second).unwrap()];
        refuse_shared(&[vm("one", only(&files[0], &first)), vm("two", only(&files[1], &second))]).unwrap();
    }

    #[test]
    fn of_many_writers_some_are_named() {
        let many: Vec<_> = (1..=20).map(|number| format!("vm-{number}")).collect();
        assert_eq!(named(&many), "vm-1, vm-2, vm-3 and 17 more");
        assert_eq!(named(&many[..2]), "vm-1, vm-2");
    }
}
