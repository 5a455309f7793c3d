//! Paths of processes with another root directory than the daemon's, such as those that Firecracker's jailer starts.

use std::path::Path;

use pagecast::proc_files::path_in_maps;

use crate::inode::InodeId;

/// Returns `true` if the process has opened the file at `place`. `mapped` is the path in its `/proc/PID/maps`, which
/// starts at the root directory of the process, and is escaped by the kernel. `place` need not exist any more.
pub(crate) fn is_at(pid: i32, mapped: &Path, place: &Path) -> bool {
    if mapped == path_in_maps(place) {
        return true;
    }
    let of = |path: &Path| rustix::fs::stat(path).map(|stat| InodeId::of_stat(&stat));
    // The folder above `place` that has to be the root directory for `mapped` to be `place`, if there is one.
    let is_root = |root: &&Path| {
        let below = place.strip_prefix(root).map(|below| Path::new("/").join(below));
        below.is_ok_and(|below| mapped == path_in_maps(&below))
    };
    let Some(root) = place.ancestors().skip(1).find(is_root) else {
        return false;
    };
    match (of(root), of(Path::new(&format!("/proc/{pid}/root")))) {
        (Ok(jail), Ok(theirs)) => jail == theirs,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> i32 {
        std::process::id().cast_signed()
    }

    #[test]
    fn a_path_is_that_of_a_place_without_a_jail() {
        assert!(is_at(own(), Path::new("/srv/mem"), Path::new("/srv/mem")));
        assert!(!is_at(own(), Path::new("/srv/mem"), Path::new("/srv/other")));
    }

    #[test]
    fn the_end_of_a_place_is_not_enough() {
        let folder = tempfile::tempdir().unwrap();
        // This folder is not the root directory of this process.
        assert!(!is_at(own(), Path::new("/mem"), &folder.path().join("mem")));
        assert!(!is_at(own(), Path::new(""), &folder.path().join("mem")));
        assert!(!is_at(own(), Path::new("mem"), &folder.path().join("mem")));
    }

    #[test]
    fn a_place_in_the_root_directory_of_the_process_is_found() {
        // The root directory, by another name.
        assert!(is_at(own(), Path::new("/mem"), Path::new("/proc/self/root/mem")));
        assert!(!is_at(0, Path::new("/mem"), Path::new("/proc/self/root/mem")));
    }
}
