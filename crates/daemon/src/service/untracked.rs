//! VMMs found by the path of the memory file that they map.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use pagecast::server::chain;

use crate::jailed;
use crate::local_file::LocalFile;
use crate::placement::{How, Placement};
use crate::vmm_process::{self, VmmError, VmmProcess};

/// Processes whose pid was not given.
#[derive(Default)]
pub(super) struct UntrackedVmms {
    /// VMMs that map the file of a template by a path for forks.
    pub(super) vmms: Vec<VmmProcess>,
    /// Pids of processes that may be such VMMs, and why they cannot be inspected.
    pub(super) unknown: Vec<(i32, String)>,
}

/// Finds VMMs that map the file of a template by one of these places, those of known forks included.
///
/// # Errors
///
/// There is no `/proc`.
pub(super) fn untracked_vmms(file: &LocalFile, places: &[&Placement]) -> io::Result<UntrackedVmms> {
    let inode = file.inode();
    let holders = vmm_process::holders(&BTreeSet::from([inode]))?;
    let mut untracked = UntrackedVmms::default();
    for process in holders.may_hold(file.mem_file.identity().size()) {
        untracked.unknown.push((process.pid, process.why.to_string()));
    }
    let is_fork = |pid, paths: &[PathBuf]| {
        paths
            .iter()
            .any(|path| places.iter().any(|place| is_at(pid, path, place)))
    };
    for holder in holders.found.iter().filter(|holder| is_fork(holder.pid, &holder.paths)) {
        // Checked again with the pid held, so that it cannot be another process.
        let looked = VmmProcess::open(holder.pid).map(|vmm| (vmm.mapped_paths(inode), vmm));
        match looked {
            Ok((Ok(paths), vmm)) if is_fork(vmm.pid(), &paths) => untracked.vmms.push(vmm),
            Ok((Ok(_), _)) | Err(VmmError::NoProcess { .. }) => {}
            Ok((Err(error), _)) => untracked.unknown.push((holder.pid, error.to_string())),
            Err(error) => untracked.unknown.push((holder.pid, chain(&error))),
        }
    }
    Ok(untracked)
}

/// Returns `true` if the path of a mapping in `/proc` is this place. The place may be removed by now: the kernel shows
/// a removed link as deleted, and a removed mount of one file as `/`. A mount may have a link below it.
fn is_at(pid: i32, mapped: &Path, place: &Placement) -> bool {
    let before = mapped.as_os_str().as_bytes().strip_suffix(b" (deleted)");
    let before = before.map(|bytes| Path::new(OsStr::from_bytes(bytes)));
    jailed::is_at(pid, mapped, place.path())
        || before.is_some_and(|path| jailed::is_at(pid, path, place.path()))
        || matches!(place.how(), How::BindMount { .. } if mapped == Path::new("/"))
}
