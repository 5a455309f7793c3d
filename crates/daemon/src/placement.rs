//! Puts the memory file of a template at a path where a VMM can open it. The inode is the same: a copy would share no
//! page cache.
//!
//! The path is a **hard link**, with the owner and mode of the template, or a read-only **bind mount**. The mount is
//! over such a link, or over a new empty file if no link is possible (another file system, an immutable file). Existing
//! files are never replaced, and only files and mounts made by the daemon are ever removed.
//!
//! If another user may own the folder, a mount is preferred ([`Prefer::Mount`]). A `chown -R` of a jail changes the
//! owner of the template through a link, and fails with `EROFS` through a mount.
//!
//! A bind mount is made in the mount namespace of this process. A VMM in another namespace sees it if mounts propagate
//! there, or if that namespace is created later, as by Firecracker's jailer. Otherwise it sees the link below the
//! mount.
//!
//! Placing takes two steps, so that a daemon killed between them leaves nothing behind. [`PlannedPlacement::new`] changes
//! nothing; save the result; call [`PlannedPlacement::carry_out`]; save the [`Placement`] in its place. Either can be
//! undone after it was loaded.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use serde::{Deserialize, Serialize};

use crate::inode::InodeId;

/// Why a file could not be placed, or a placement not be removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum PlaceError {
    /// The path is relative, or ends in no name.
    #[error("{} is not an absolute path of a file", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The folder of the path does not exist, or this process may not use it.
    #[error("the folder of {} cannot be opened: {source}; create it first", path.display())]
    Folder {
        /// The path, with its last name.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another file is at the path, and was left there.
    #[error("{what} is already at {}; remove it, or request another path", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
        /// The kind of file at the path.
        what: &'static str,
    },
    /// Neither a link nor a mount is possible here.
    #[error(
        "at {}, neither a hard link ({}) nor a bind mount ({}) of the template is possible; use a path on the file system \
         of the template, or run with CAP_SYS_ADMIN",
        path.display(), why_no_link(link), why_no_mount(mount)
    )]
    Impossible {
        /// The path.
        path: PathBuf,
        /// The error of the hard link.
        link: io::Error,
        /// The error of the bind mount.
        mount: io::Error,
    },
    /// The file at the path after placing is not the template, or the folder was replaced: another process changes them
    /// at the same time.
    #[error("another process changes {} or its folder while the template is placed there; use another path", path.display())]
    Interfered {
        /// The path.
        path: PathBuf,
    },
    /// The given file is not the one in the plan.
    #[error("{} was planned for {planned}, not for {given}", path.display())]
    OtherFile {
        /// The path.
        path: PathBuf,
        /// The file in the plan.
        planned: InodeId,
        /// The given file.
        given: InodeId,
    },
    /// Any other error.
    #[error("failed to {doing} {}: {source}", path.display())]
    Io {
        /// The failed operation, as in "failed to …".
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn why_no_link(error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::XDEV) => "it is on another file system or mount".to_owned(),
        Some(Errno::PERM) => {
            "not permitted: the template is immutable, or neither ours nor writable for us (fs.protected_hardlinks), or \
             the file system has no links"
                .to_owned()
        }
        Some(Errno::MLINK) => "the template has the maximum number of links".to_owned(),
        Some(Errno::NOENT) => "the template has been deleted".to_owned(),
        _ => error.to_string(),
    }
}

fn why_no_mount(error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::PERM) => "needs CAP_SYS_ADMIN".to_owned(),
        _ => error.to_string(),
    }
}

/// The way of placing a file that is tried first. The other is used if it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prefer {
    /// A hard link, for a folder that only the daemon uses.
    Link,
    /// A read-only bind mount, for a folder whose owner may change the owner and mode of all files in it.
    Mount,
}

/// The way a file was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum How {
    /// Another name of the same inode.
    HardLink,
    /// A read-only mount of the inode.
    BindMount {
        /// The file below the mount: an empty file, or a hard link of the inode.
        over: InodeId,
    },
}

/// The outcome of removing a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// The placement was removed.
    Removed,
    /// It did not exist any more.
    Gone,
    /// Another file is at the path, or the folder was replaced. Nothing was removed.
    NotOurs,
}

/// A placement that may not have been carried out: path, folder and inode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlannedPlacement {
    path: PathBuf,
    folder: InodeId,
    template: InodeId,
}

/// A placed file. Dropping it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use = "what was placed stays until it is removed"]
pub(crate) struct Placement {
    plan: PlannedPlacement,
    how: How,
}

impl PlannedPlacement {
    /// Checks that `file` could be placed at the absolute path `at`, and changes nothing.
    ///
    /// # Errors
    ///
    /// The path is invalid, its folder does not exist, or a file or symbolic link is at the path already.
    pub(crate) fn new(file: BorrowedFd<'_>, at: &Path) -> Result<Self, PlaceError> {
        let no_path = || PlaceError::Path { path: at.to_owned() };
        if !at.is_absolute() || at.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(no_path());
        }
        let name = at.file_name().ok_or_else(no_path)?;
        let spot = Spot::open(at, name.to_owned())?;
        let failed = |errno: Errno| spot.failed("look at", errno);
        let plan = Self {
            path: at.to_owned(),
            folder: InodeId::of(&spot.folder).map_err(failed)?,
            template: InodeId::of(file).map_err(failed)?,
        };
        match spot.look().map_err(failed)? {
            Some(there) => Err(spot.exists(&there, plan.template)),
            None => Ok(plan),
        }
    }

    /// Places the file, which must be the one in the plan. Leaves nothing behind if that fails.
    ///
    /// # Errors
    ///
    /// [`PlaceError`]: a file is at the path by now, or no link or mount is possible.
    pub(crate) fn carry_out(&self, file: BorrowedFd<'_>, prefer: Prefer) -> Result<Placement, PlaceError> {
        let spot = self.spot()?;
        let given = InodeId::of(file).map_err(|errno| spot.failed("look at", errno))?;
        if given != self.template {
            return Err(PlaceError::OtherFile {
                path: self.path.clone(),
                planned: self.template,
                given,
            });
        }
        if InodeId::of(&spot.folder).map_err(|errno| spot.failed("look at the folder of", errno))? != self.folder {
            return Err(self.interfered());
        }
        let how = match spot.link(file) {
            Ok(()) if prefer == Prefer::Mount => self.mount_over_link(&spot, file)?,
            Ok(()) => How::HardLink,
            Err(Errno::EXIST) => return Err(self.exists(&spot)),
            // No link of the template is possible here, but a mount may be.
            Err(link @ (Errno::XDEV | Errno::PERM | Errno::MLINK | Errno::NOENT | Errno::OPNOTSUPP)) => {
                let over = self.bind(&spot, file, link)?;
                How::BindMount { over }
            }
            Err(errno) => return Err(spot.failed("make a hard link at", errno)),
        };
        let placement = Placement {
            plan: self.clone(),
            how,
        };
        let there = spot.look().map_err(|errno| spot.failed("look at", errno))?;
        if there.is_some_and(|there| there.id == self.template) {
            return Ok(placement);
        }
        // Removes only a link or mount made by this call.
        placement.remove()?;
        Err(self.interfered())
    }

    /// Removes what an interrupted [`carry_out`](Self::carry_out) may have left. An empty file without a mount stays,
    /// since it may belong to another process.
    ///
    /// # Errors
    ///
    /// The placement exists and cannot be removed.
    pub(crate) fn undo(&self) -> Result<Removal, PlaceError> {
        self.take_away(None)
    }

    fn spot(&self) -> Result<Spot<'_>, PlaceError> {
        // `new` checks that the path has a name; a loaded plan may have any path.
        let name = self.path.file_name().ok_or_else(|| PlaceError::Path {
            path: self.path.clone(),
        })?;
        Spot::open(&self.path, name.to_owned())
    }

    fn interfered(&self) -> PlaceError {
        PlaceError::Interfered {
            path: self.path.clone(),
        }
    }

    fn exists(&self, spot: &Spot<'_>) -> PlaceError {
        match spot.look() {
            Ok(Some(there)) => spot.exists(&there, self.template),
            _ => spot.failed("make a hard link at", Errno::EXIST),
        }
    }

    /// Mounts `file` over a hard link of it. If that fails, the link remains the placement.
    fn mount_over_link(&self, spot: &Spot<'_>, file: BorrowedFd<'_>) -> Result<How, PlaceError> {
        let point = spot
            .open_what_is_there()
            .map_err(|errno| spot.failed("look at", errno))?;
        let there = There::of(&point).map_err(|errno| spot.failed("look at", errno))?;
        if there.id != self.template || there.is_mount {
            return Err(self.interfered());
        }
        if spot.mount(file, &point, self.template).is_ok() {
            return Ok(How::BindMount { over: self.template });
        }
        // Removes an unfinished mount.
        spot.unmount(self.template)
            .map_err(|errno| spot.failed("unmount", errno))?;
        Ok(How::HardLink)
    }

    /// Mounts `file` over a new empty file, and returns the inode of that.
    fn bind(&self, spot: &Spot<'_>, file: BorrowedFd<'_>, link: Errno) -> Result<InodeId, PlaceError> {
        let point = match spot.create() {
            Ok(point) => point,
            Err(Errno::EXIST) => return Err(self.exists(spot)),
            Err(errno) => return Err(spot.failed("make an empty file to mount on at", errno)),
        };
        let over = InodeId::of(&point).map_err(|errno| spot.failed("look at", errno))?;
        let mounted = spot.mount(file, &point, self.template);
        if let Err(mount) = mounted {
            let placed = Placement {
                plan: self.clone(),
                how: How::BindMount { over },
            };
            // Removes the mount, if there is one, and the empty file.
            placed.remove()?;
            return Err(PlaceError::Impossible {
                path: self.path.clone(),
                link: link.into(),
                mount: mount.into(),
            });
        }
        Ok(over)
    }

    /// Removes the placement at the path: one made in the way `how`, or in any way if that is `None`.
    fn take_away(&self, how: Option<How>) -> Result<Removal, PlaceError> {
        let spot = match self.spot() {
            Ok(spot) => spot,
            Err(PlaceError::Folder { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                return Ok(Removal::Gone);
            }
            Err(error) => return Err(error),
        };
        let look = || spot.look().map_err(|errno| spot.failed("look at", errno));
        if InodeId::of(&spot.folder).map_err(|errno| spot.failed("look at the folder of", errno))? != self.folder {
            return Ok(Removal::NotOurs);
        }
        let Some(there) = look()? else {
            return Ok(Removal::Gone);
        };
        let may_be_link = !matches!(how, Some(How::BindMount { .. }));
        let may_be_mount = how != Some(How::HardLink);
        if there.id == self.template && !there.is_mount && may_be_link {
            spot.unlink().map_err(|errno| spot.failed("remove", errno))?;
            return Ok(Removal::Removed);
        }
        let was_mounted = there.id == self.template && there.is_mount && may_be_mount;
        if was_mounted
            && !spot
                .unmount(self.template)
                .map_err(|errno| spot.failed("unmount", errno))?
        {
            return Ok(Removal::NotOurs);
        }
        let Some(below) = look()? else {
            return Ok(Removal::Removed);
        };
        let is_mount_point = if let Some(How::BindMount { over }) = how {
            below.id == over
        } else {
            // Only the daemon mounts templates, and only over empty files and links of them.
            let is_empty = below.kind == FileType::RegularFile && below.size == 0;
            was_mounted && (is_empty || below.id == self.template)
        };
        if !is_mount_point || below.is_mount {
            return Ok(Removal::NotOurs);
        }
        spot.unlink().map_err(|errno| spot.failed("remove", errno))?;
        Ok(Removal::Removed)
    }
}

impl Placement {
    /// The path of the placed file.
    pub(crate) fn path(&self) -> &Path {
        &self.plan.path
    }

    /// The way it was placed.
    pub(crate) fn how(&self) -> How {
        self.how
    }

    /// Returns `true` if `file` is still at the path, placed in this way.
    pub(crate) fn holds(&self, file: BorrowedFd<'_>) -> bool {
        let is_ours = |there: There| {
            there.id == self.plan.template && there.is_mount == matches!(self.how, How::BindMount { .. })
        };
        let there = self.plan.spot().ok().and_then(|spot| spot.look().ok()).flatten();
        there.is_some_and(is_ours) && InodeId::of(file).is_ok_and(|given| given == self.plan.template)
    }

    /// Removes the placement. A VMM that has opened the file keeps it. Another file at the path is left alone, and
    /// reported as [`Removal::NotOurs`].
    ///
    /// # Errors
    ///
    /// The placement exists and cannot be removed.
    pub(crate) fn remove(&self) -> Result<Removal, PlaceError> {
        self.plan.take_away(Some(self.how))
    }
}

/// A name in an open folder, so that renames of folders above it cannot redirect the path.
struct Spot<'a> {
    path: &'a Path,
    folder: OwnedFd,
    name: OsString,
}

/// The file at a spot.
struct There {
    id: InodeId,
    kind: FileType,
    size: u64,
    is_mount: bool,
}

impl<'a> Spot<'a> {
    fn open(path: &'a Path, name: OsString) -> Result<Self, PlaceError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(folder, flags, Mode::empty()) {
            Ok(folder) => Ok(Self { path, folder, name }),
            Err(errno) => Err(PlaceError::Folder {
                path: path.to_owned(),
                source: errno.into(),
            }),
        }
    }

    fn failed(&self, doing: &'static str, errno: Errno) -> PlaceError {
        PlaceError::Io {
            doing,
            path: self.path.to_owned(),
            source: errno.into(),
        }
    }

    fn exists(&self, there: &There, template: InodeId) -> PlaceError {
        PlaceError::Exists {
            path: self.path.to_owned(),
            what: match there.kind {
                _ if there.id == template => "the template itself",
                FileType::RegularFile => "a file",
                FileType::Directory => "a folder",
                FileType::Symlink => "a symbolic link",
                _ => "something",
            },
        }
    }

    /// Returns the file at the spot, if any. Does not follow symbolic links, but sees mounts.
    fn look(&self) -> Result<Option<There>, Errno> {
        match self.open_what_is_there() {
            Ok(there) => Ok(Some(There::of(&there)?)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn open_what_is_there(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty())
    }

    /// Creates a hard link of the open file itself. Never replaces a file.
    fn link(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        rustix::fs::linkat(CWD, path_of(file), &self.folder, &self.name, AtFlags::SYMLINK_FOLLOW)
    }

    /// Creates an empty file. Never opens an existing one.
    fn create(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, &self.name, flags, Mode::RUSR)
    }

    /// Mounts the open file itself over the open file `point`.
    fn mount(&self, file: BorrowedFd<'_>, point: &OwnedFd, template: InodeId) -> Result<(), Errno> {
        rustix::mount::mount_bind(path_of(file), path_of(point.as_fd()))?;
        let mounted = self.open_what_is_there()?;
        let there = There::of(&mounted)?;
        if there.id != template || !there.is_mount {
            // Another process has replaced the file at the path meanwhile.
            return Err(Errno::EXIST);
        }
        // A bind mount inherits the flags of its source mount, so read-only needs a second call.
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount_remount(path_of(mounted.as_fd()), flags, "")?;
        // The mount has already propagated writable, and the remount does not propagate. A copy of it propagates
        // read-only.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let copy = match rustix::mount::open_tree(&mounted, "", flags) {
            Ok(copy) => copy,
            // Linux before 5.2 has no `open_tree`.
            Err(Errno::NOSYS) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        rustix::mount::unmount(path_of(mounted.as_fd()), UnmountFlags::DETACH)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&copy, "", point, "", flags)
    }

    /// Unmounts the template, and nothing else. Returns `false` if it was not mounted. Processes that have it open keep
    /// it.
    fn unmount(&self, template: InodeId) -> Result<bool, Errno> {
        let mounted = self.open_what_is_there()?;
        let there = There::of(&mounted)?;
        if there.id != template || !there.is_mount {
            return Ok(false);
        }
        // Through the descriptor in `/proc`, so that renames of the path do not redirect it.
        rustix::mount::unmount(path_of(mounted.as_fd()), UnmountFlags::DETACH)?;
        Ok(true)
    }

    fn unlink(&self) -> Result<(), Errno> {
        match rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl There {
    fn of(file: &OwnedFd) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(file)?;
        let statx = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
        Ok(Self {
            id: InodeId::of_stat(&stat),
            kind: FileType::from_raw_mode(stat.st_mode),
            size: stat.st_size.unsigned_abs(),
            is_mount: statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
        })
    }
}

/// Returns a path to the open file itself, valid until it is closed.
fn path_of(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests;
