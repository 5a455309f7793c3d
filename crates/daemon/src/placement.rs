//! Puts the memory file of a template at a path where a VMM can open it: the same inode, never a copy, since another inode
//! shares nothing.
//!
//! Either a **hard link**, whose owner and mode are the template's, or a read-only **bind mount**, over that link or, where none
//! can be made (another file system, an immutable file), over a new empty file. Nothing that exists is ever replaced, and only
//! what is known to be ours is ever taken away.
//!
//! Where others may own the folder ([`Prefer::Mount`]), the mount comes first: a `chown -R` of a jail changes the owner of the
//! template through a link, and fails with `EROFS` through the mount.
//!
//! A bind mount is made in the mount namespace of this process. A VMM in another one sees it where mounts propagate there, or
//! where its namespace is made afterwards, as Firecracker's jailer does; elsewhere it sees the link below.
//!
//! Placing is done in two steps, so that nothing is left behind by a process that is killed in between: [`Plan::new`]
//! looks and changes nothing; write the plan down; [`Plan::carry_out`]; write down the [`Placement`] in its place.
//! Both can be undone after they were read back.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use serde::{Deserialize, Serialize};

use crate::inode::InodeId;

/// A file could not be placed, or what was placed could not be taken away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum PlaceError {
    /// The path is relative, or ends in no name.
    #[error("{} is not an absolute path of a file", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The folder of the path is not there, or not ours to use.
    #[error("the folder of {} cannot be opened: {source}; create it first", path.display())]
    Folder {
        /// The path, with its last name.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something is at the path, and is left there.
    #[error("{what} is already at {}; remove it, or request another path", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// Neither way works here.
    #[error(
        "at {}, neither a hard link ({}) nor a bind mount ({}) of the template is possible; use a path on the file system \
         of the template, or run with CAP_SYS_ADMIN",
        path.display(), why_no_link(link), why_no_mount(mount)
    )]
    Impossible {
        /// The path.
        path: PathBuf,
        /// Why there is no hard link.
        link: io::Error,
        /// Why there is no bind mount.
        mount: io::Error,
    },
    /// What is at the path after placing is not the template, or its folder is no longer the one that was looked at:
    /// somebody else changes them at the same time.
    #[error("another process changes {} or its folder while the template is placed there; use another path", path.display())]
    Interfered {
        /// The path.
        path: PathBuf,
    },
    /// The file given is not the one that the plan was made for.
    #[error("{} was planned for {planned}, not for {given}", path.display())]
    OtherFile {
        /// The path.
        path: PathBuf,
        /// The file of the plan.
        planned: InodeId,
        /// The file given.
        given: InodeId,
    },
    /// Anything else.
    #[error("failed to {doing} {}: {source}", path.display())]
    Io {
        /// What failed, as in "failed to …".
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
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

/// Which way of placing a file is tried first. The other follows where that does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prefer {
    /// A hard link: for a folder that nobody but us uses.
    Link,
    /// A read-only bind mount: for a folder whose owner may change the owner and mode of all that is in it.
    Mount,
}

/// How a file was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum How {
    /// Another name of the same inode.
    HardLink,
    /// A read-only mount of the inode.
    BindMount {
        /// What it hides: an empty file, or a hard link of the inode.
        over: InodeId,
    },
}

/// What became of what was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// It was there, and is gone.
    Removed,
    /// It was gone already.
    Gone,
    /// Something else is at the path, or in place of its folder, and was left there.
    NotOurs,
}

/// Where a file is to be placed, and which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    path: PathBuf,
    folder: InodeId,
    template: InodeId,
}

/// A file that was placed. Dropping it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use = "what was placed stays until it is removed"]
pub(crate) struct Placement {
    plan: Plan,
    how: How,
}

impl Plan {
    /// Looks whether `file` could be placed at the absolute path `at`, and changes nothing.
    ///
    /// # Errors
    ///
    /// The path is none, its folder is not there, or something is there already, be it a symbolic link.
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

    /// Places the file, which must be the one that the plan was made for. Nothing is left where this fails.
    ///
    /// # Errors
    ///
    /// [`PlaceError`]: something is there by now, or it is not possible.
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
            // The template cannot be linked to here; another way may lead there.
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
        // Nothing but what is known to be ours.
        placement.remove()?;
        Err(self.interfered())
    }

    /// Takes away what [`carry_out`](Self::carry_out) may have left when it was killed in the middle. Where it was killed
    /// between making an empty file and mounting on it, that file stays: it cannot be told from one of somebody else's.
    ///
    /// # Errors
    ///
    /// It is there and cannot be taken away.
    pub(crate) fn undo(&self) -> Result<Removal, PlaceError> {
        self.take_away(None)
    }

    fn spot(&self) -> Result<Spot<'_>, PlaceError> {
        // `new` has seen to it that there is a name; what was read back may be anything.
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

    /// Mounts `file` over a hard link of it. Where that is not possible, the link has to do.
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
        // What there is of the mount.
        spot.unmount(self.template)
            .map_err(|errno| spot.failed("unmount", errno))?;
        Ok(How::HardLink)
    }

    /// Mounts `file` over a new empty file, which is the answer.
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
            // The mount, if there is one, and the empty file.
            placed.remove()?;
            return Err(PlaceError::Impossible {
                path: self.path.clone(),
                link: link.into(),
                mount: mount.into(),
            });
        }
        Ok(over)
    }

    /// Takes away what is at the path, if it was placed there in this way, or in any way where that is not known.
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
            // Only we mount templates, and only over empty files and links of them.
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
    /// Where the file was placed.
    pub(crate) fn path(&self) -> &Path {
        &self.plan.path
    }

    /// How it was placed.
    pub(crate) fn how(&self) -> How {
        self.how
    }

    /// Whether this file is still there, placed in this way.
    pub(crate) fn holds(&self, file: BorrowedFd<'_>) -> bool {
        let is_ours = |there: There| {
            there.id == self.plan.template && there.is_mount == matches!(self.how, How::BindMount { .. })
        };
        let there = self.plan.spot().ok().and_then(|spot| spot.look().ok()).flatten();
        there.is_some_and(is_ours) && InodeId::of(file).is_ok_and(|given| given == self.plan.template)
    }

    /// Takes it away. A VMM that has opened the file keeps it. What is not ours is left alone, and told.
    ///
    /// # Errors
    ///
    /// It is there and cannot be taken away.
    pub(crate) fn remove(&self) -> Result<Removal, PlaceError> {
        self.plan.take_away(Some(self.how))
    }
}

/// A name in a folder that is held, so that whoever may rename folders above it cannot lead us elsewhere.
struct Spot<'a> {
    path: &'a Path,
    folder: OwnedFd,
    name: OsString,
}

/// What is at a spot.
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

    /// What is there; symbolic links are not followed, mounts are.
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

    /// Makes a hard link of exactly the file that is open. Never replaces anything.
    fn link(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        rustix::fs::linkat(CWD, path_of(file), &self.folder, &self.name, AtFlags::SYMLINK_FOLLOW)
    }

    /// Makes an empty file. Never opens one that is there.
    fn create(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, &self.name, flags, Mode::RUSR)
    }

    /// Mounts exactly the file that is open over exactly the file that is open as `point`.
    fn mount(&self, file: BorrowedFd<'_>, point: &OwnedFd, template: InodeId) -> Result<(), Errno> {
        rustix::mount::mount_bind(path_of(file), path_of(point.as_fd()))?;
        let mounted = self.open_what_is_there()?;
        let there = There::of(&mounted)?;
        if there.id != template || !there.is_mount {
            // Somebody has put something else there meanwhile.
            return Err(Errno::EXIST);
        }
        // A bind mount starts with the flags of the mount that it is taken from: read-only needs a second call.
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount_remount(path_of(mounted.as_fd()), flags, "")?;
        // It has propagated as it was before, and does not change elsewhere. A copy of it propagates read-only.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let copy = match rustix::mount::open_tree(&mounted, "", flags) {
            Ok(copy) => copy,
            // Before Linux 5.2.
            Err(Errno::NOSYS) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        rustix::mount::unmount(path_of(mounted.as_fd()), UnmountFlags::DETACH)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&copy, "", point, "", flags)
    }

    /// Unmounts the template, and nothing else; answers whether it was there. Whoever has it open keeps it.
    fn unmount(&self, template: InodeId) -> Result<bool, Errno> {
        let mounted = self.open_what_is_there()?;
        let there = There::of(&mounted)?;
        if there.id != template || !there.is_mount {
            return Ok(false);
        }
        // Through the descriptor, so that it is this mount whatever becomes of the path. It follows what is in /proc.
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

/// A path that leads to exactly the file that is open, until it is closed.
fn path_of(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests;
