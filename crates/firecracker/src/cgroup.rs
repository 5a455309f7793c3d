//! The cgroups that the jailer creates.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io};

/// Time that the kernel may take to release the cgroup of ended processes.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between two tries.
const PACE: Duration = Duration::from_millis(10);

/// The version of the cgroups of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupVersion {
    /// A hierarchy for each controller.
    V1,
    /// One hierarchy.
    V2,
}

impl CgroupVersion {
    /// The version that is mounted at `/sys/fs/cgroup`.
    pub fn of_host() -> Self {
        if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            Self::V2
        } else {
            Self::V1
        }
    }

    /// In the form of the jailer's arguments.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "1",
            Self::V2 => "2",
        }
    }
}

/// Removes the cgroup `parent`, which is a child of the root, and its children, in each hierarchy. The processes in them must
/// have been killed. Does nothing if there is none.
///
/// # Errors
///
/// A process in one of them is still alive.
pub fn remove_cgroups(parent: &OsStr) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let cgroups = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        fields.next()?.starts_with("cgroup").then_some(path)
    });
    for mount in cgroups {
        let parent = Path::new(mount).join(parent);
        let children = fs::read_dir(&parent).into_iter().flatten().flatten();
        for child in children.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove(&child.path())?;
        }
        remove(&parent)?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(path) {
            // The kernel has not yet removed the ended processes.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(PACE);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            done => return done,
        }
    }
}
