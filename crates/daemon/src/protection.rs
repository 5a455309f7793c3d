//! Protects the memory file of a template from writes, and undoes that.
//!
//! Neither way changes the mtime, which is a part of the file's identity. On most file systems neither stops a process
//! that already has the file open for writing, so changes must still be noticed.
//!
//! Protection takes two steps, so that it can be undone after a crash between them. [`Applied::plan`] changes nothing;
//! save its result; then call [`Applied::enforce`].
//!
//! The saved plan may be lost, for example a run dir on tmpfs when the host restarts. So a [`Mark`] on the file itself
//! records the change, and the next template of the file takes it over.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pagecast_client::template::Protection;
use rustix::fs::{AtFlags, IFlags, Mode, OFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::inode::InodeId;

/// Why a file could not be protected, or its protection not be undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ProtectError {
    /// This process may not change the mode of the file.
    #[error(
        "the write permissions of the file cannot be changed: it is immutable, or belongs to another user; run as its \
         owner or with CAP_FOWNER, or do not protect it"
    )]
    Permission,
    /// The file system has no immutable flag.
    #[error(
        "its file system has no immutable flag; protect it as readonly, or keep it on ext4, XFS, Btrfs or a recent \
         tmpfs"
    )]
    NoImmutableFlag,
    /// This process may not change the immutable flag.
    #[error("the immutable flag cannot be changed without CAP_LINUX_IMMUTABLE; run with it, or protect it as readonly")]
    ImmutablePermission,
    /// The file system is mounted read-only here.
    #[error("its file system is mounted read-only here; mount it writable, or do not protect it")]
    ReadOnlyFileSystem,
    /// The given file is not the protected one.
    #[error("the protected file was replaced: it is {given}, was {protected}")]
    OtherFile {
        /// The protected file.
        protected: InodeId,
        /// The given file.
        given: InodeId,
    },
    /// Any other error.
    #[error("failed to {doing} the file: {source}")]
    Io {
        /// The failed operation, as in "failed to … the file".
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// The outcome of undoing a protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// The file is as it was before.
    Restored,
    /// Another process has changed the mode since; the mode was left as it is.
    ChangedSince,
    /// The file is gone.
    Gone,
}

/// The protection of one file, with all data that undoing needs. Dropping it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use = "a protection stays until it is undone"]
pub(crate) struct Applied {
    file: InodeId,
    change: Change,
}

/// The change to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    /// Nothing.
    None,
    /// Write permissions are removed from the mode `mode_before`.
    Readonly { mode_before: u32 },
    /// The immutable flag is set, unless it was set before.
    Immutable { set_before: bool },
}

impl Applied {
    /// Plans the protection of `file`, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`ProtectError`]: this protection is not possible here.
    pub(crate) fn plan(file: BorrowedFd<'_>, protection: Protection) -> Result<Self, ProtectError> {
        let stat = rustix::fs::fstat(file).map_err(failed("look at"))?;
        let change = match (protection, left(file, &stat)) {
            // The protection that an earlier daemon left is taken over. It suffices for this request.
            (Protection::None | Protection::Readonly, Some(left))
            | (Protection::Immutable, Some(left @ Change::Immutable { .. })) => left,
            (Protection::None, None) => Change::None,
            (Protection::Readonly, None) => Change::Readonly {
                mode_before: Mode::from_raw_mode(stat.st_mode).bits(),
            },
            (Protection::Immutable, _) => Change::Immutable {
                set_before: flags(file)?.contains(IFlags::IMMUTABLE),
            },
        };
        Ok(Self {
            file: InodeId::of_stat(&stat),
            change,
        })
    }

    /// Returns the plan without any change to the file.
    pub(crate) fn nothing(self) -> Self {
        Self {
            change: Change::None,
            ..self
        }
    }

    /// Returns `true` if the file is not changed.
    pub(crate) fn is_nothing(&self) -> bool {
        self.change == Change::None
    }

    /// Returns the plan for a file that `first` protects already, for another template. The plan that is undone last
    /// restores the state before `first`. `None` if the two protections differ.
    pub(crate) fn beside(self, first: &Self) -> Option<Self> {
        use Change::{Immutable, Readonly};
        match (self.change, first.change) {
            (Readonly { .. }, Readonly { .. }) | (Immutable { .. }, Immutable { .. }) => Some(*first),
            _ => None,
        }
    }

    /// Returns `true` if `other` protects the same file.
    pub(crate) fn is_shared_with(&self, other: &Self) -> bool {
        self.file == other.file && !self.is_nothing() && !other.is_nothing()
    }

    /// Returns `true` if links of the file can be neither created nor removed.
    pub(crate) fn holds_links(&self) -> bool {
        matches!(self.change, Change::Immutable { .. })
    }

    /// Protects the file, which must be the one in the plan.
    ///
    /// # Errors
    ///
    /// [`ProtectError`]; nothing was changed then.
    pub(crate) fn enforce(&self, file: BorrowedFd<'_>) -> Result<(), ProtectError> {
        self.check(file)?;
        let changed = match self.change {
            Change::None => return Ok(()),
            Change::Readonly { mode_before } => {
                let before = Mode::from_bits_retain(mode_before);
                if before == before - writable() {
                    return Ok(());
                }
                // Marked first: a file without write permissions cannot be marked.
                mark(file, self.change);
                change_mode(file, before, before - writable())
            }
            Change::Immutable { set_before } => {
                let flags = flags(file)?;
                if set_before || flags.contains(IFlags::IMMUTABLE) {
                    return Ok(());
                }
                mark(file, self.change);
                set_flags(file, flags | IFlags::IMMUTABLE)
            }
        };
        if changed.is_err() {
            unmark(file);
        }
        changed
    }

    /// Undoes the protection. Restores the mode only if no other process has changed it since.
    ///
    /// # Errors
    ///
    /// `file` is another file, or cannot be changed.
    pub(crate) fn undo(&self, file: BorrowedFd<'_>) -> Result<Undone, ProtectError> {
        self.check(file)?;
        match self.change {
            Change::None => {}
            Change::Readonly { mode_before } => {
                let before = Mode::from_bits_retain(mode_before);
                let stat = rustix::fs::fstat(file).map_err(failed("look at"))?;
                let now = Mode::from_raw_mode(stat.st_mode);
                if now != before && now != before - writable() {
                    unmark(file);
                    return Ok(Undone::ChangedSince);
                }
                change_mode(file, now, before)?;
                unmark(file);
            }
            Change::Immutable { set_before } => {
                if !set_before {
                    let now = flags(file)?;
                    if now.contains(IFlags::IMMUTABLE) {
                        set_flags(file, now - IFlags::IMMUTABLE)?;
                    }
                    unmark(file);
                }
            }
        }
        Ok(Undone::Restored)
    }

    /// Undoes a loaded protection for the file at `path`, if that is still the same file.
    ///
    /// # Errors
    ///
    /// As for [`undo`](Self::undo), or the file cannot be opened.
    pub(crate) fn undo_at(&self, path: &Path) -> Result<Undone, ProtectError> {
        // The file at the path may have been replaced, even by a FIFO.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::options()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path);
        match file {
            Ok(file) => self.undo(file.as_fd()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Undone::Gone),
            Err(source) => Err(ProtectError::Io { doing: "open", source }),
        }
    }

    fn check(&self, file: BorrowedFd<'_>) -> Result<(), ProtectError> {
        let given = InodeId::of(file).map_err(failed("look at"))?;
        if given == self.file {
            Ok(())
        } else {
            Err(ProtectError::OtherFile {
                protected: self.file,
                given,
            })
        }
    }
}

/// Names of the extended attribute that holds the mark. The first cannot be forged, and needs `CAP_SYS_ADMIN`.
const MARKS: [&str; 2] = ["trusted.pagecast.protected", "user.pagecast.protected"];

/// Buffer size for a mark, in bytes. No mark is that long.
const MARK_BYTES: usize = 512;

/// The mark of a file, set before the change that it records, so that a later daemon can undo that.
#[derive(Serialize, Deserialize)]
struct Mark {
    /// The inode of the marked file. A copy of the file may have a copy of the mark.
    inode: u64,
    /// Its birth time in seconds and nanoseconds, if its file system records that.
    born: Option<(i64, u32)>,
    change: Change,
}

/// Returns the birth time of a file, if its file system records that.
fn born(file: BorrowedFd<'_>) -> Option<(i64, u32)> {
    let statx = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok()?;
    let knows = StatxFlags::from_bits_retain(statx.stx_mask).contains(StatxFlags::BTIME);
    knows.then_some((statx.stx_btime.tv_sec, statx.stx_btime.tv_nsec))
}

/// Marks a file. If that fails, only the run dir records the protection.
fn mark(file: BorrowedFd<'_>, change: Change) {
    let marked = || -> io::Result<()> {
        let mark = Mark {
            inode: rustix::fs::fstat(file)?.st_ino,
            born: born(file),
            change,
        };
        let mark = serde_json::to_vec(&mark)?;
        let [trusted, user] = MARKS;
        let set = |name| rustix::fs::fsetxattr(file, name, &mark, XattrFlags::empty());
        Ok(set(trusted).or_else(|_| set(user))?)
    };
    if let Err(error) = marked() {
        warn!(%error, "the memory file cannot be marked as protected by pagecast: if the run dir is lost, the protection is not undone");
    }
}

/// Removes the mark.
fn unmark(file: BorrowedFd<'_>) {
    for name in MARKS {
        match rustix::fs::fremovexattr(file, name) {
            // Most file systems return one of these errors if there is no mark.
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(errno) => warn!(%errno, name, "the mark of a memory file that is no longer protected stays"),
        }
    }
}

/// Returns the change that an earlier daemon has left on a file, if that daemon's record is lost.
fn left(file: BorrowedFd<'_>, stat: &rustix::fs::Stat) -> Option<Change> {
    let mut bytes = [0; MARK_BYTES];
    let mark = MARKS.iter().find_map(|name| {
        let length = rustix::fs::fgetxattr(file, *name, &mut bytes[..]).ok()?;
        serde_json::from_slice::<Mark>(bytes.get(..length)?).ok()
    })?;
    let is_of_this = mark.inode == stat.st_ino && mark.born == born(file);
    let is_there = match mark.change {
        Change::None => false,
        // Only write permissions are ever restored.
        Change::Readonly { mode_before } => {
            let before = Mode::from_bits_retain(mode_before);
            before != before - writable() && Mode::from_raw_mode(stat.st_mode) == before - writable()
        }
        Change::Immutable { set_before } => {
            !set_before && flags(file).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE))
        }
    };
    (is_of_this && is_there).then_some(mark.change)
}

/// Returns `true` if an earlier daemon has left a file protected, and its record is lost.
pub(crate) fn is_left(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| left(file, &stat).is_some())
}

/// Returns the permissions that protection removes.
fn writable() -> Mode {
    Mode::WUSR | Mode::WGRP | Mode::WOTH
}

fn change_mode(file: BorrowedFd<'_>, from: Mode, to: Mode) -> Result<(), ProtectError> {
    if from == to {
        // Without a change, no permission is needed.
        return Ok(());
    }
    rustix::fs::fchmod(file, to).map_err(|errno| match errno {
        Errno::PERM | Errno::ACCESS => ProtectError::Permission,
        Errno::ROFS => ProtectError::ReadOnlyFileSystem,
        errno => failed("change the mode of")(errno),
    })
}

fn flags(file: BorrowedFd<'_>) -> Result<IFlags, ProtectError> {
    rustix::fs::ioctl_getflags(file).map_err(|errno| flags_failed(errno, "look at the flags of"))
}

fn set_flags(file: BorrowedFd<'_>, flags: IFlags) -> Result<(), ProtectError> {
    rustix::fs::ioctl_setflags(file, flags).map_err(|errno| flags_failed(errno, "change the flags of"))
}

fn flags_failed(errno: Errno, doing: &'static str) -> ProtectError {
    match errno {
        Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL => ProtectError::NoImmutableFlag,
        Errno::PERM | Errno::ACCESS => ProtectError::ImmutablePermission,
        Errno::ROFS => ProtectError::ReadOnlyFileSystem,
        errno => failed(doing)(errno),
    }
}

fn failed(doing: &'static str) -> impl FnOnce(Errno) -> ProtectError {
    move |errno| ProtectError::Io {
        doing,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use pagecast_testkit::skip::{Need, skip};
    use rustix::thread::CapabilitySet;

    use super::*;

    fn apply(file: BorrowedFd<'_>, protection: Protection) -> Result<Applied, ProtectError> {
        let applied = Applied::plan(file, protection)?;
        applied.enforce(file)?;
        Ok(applied)
    }

    struct Template {
        dir: tempfile::TempDir,
        file: File,
    }

    impl Template {
        fn with_mode(mode: u32) -> Self {
            Self::in_folder(&std::env::temp_dir(), mode)
        }

        fn in_folder(folder: &Path, mode: u32) -> Self {
            let dir = tempfile::tempdir_in(folder).unwrap();
            let path = dir.path().join("mem");
            std::fs::write(&path, [7; 4096]).unwrap();
            let file = File::open(path).unwrap();
            file.set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
            Self { dir, file }
        }

        fn path(&self) -> std::path::PathBuf {
            self.dir.path().join("mem")
        }

        fn mode(&self) -> u32 {
            self.file.metadata().unwrap().mode() & 0o7777
        }

        fn is_immutable(&self) -> bool {
            flags(self.file.as_fd()).unwrap().contains(IFlags::IMMUTABLE)
        }

        fn modified(&self) -> (i64, i64) {
            let metadata = self.file.metadata().unwrap();
            (metadata.mtime(), metadata.mtime_nsec())
        }

        fn set_immutable(&self, to: bool) {
            let mut flags = flags(self.file.as_fd()).unwrap();
            flags.set(IFlags::IMMUTABLE, to);
            set_flags(self.file.as_fd(), flags).unwrap();
        }
    }

    impl Drop for Template {
        fn drop(&mut self) {
            // Left by a failed test: its folder could not be removed.
            if flags(self.file.as_fd()).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE)) {
                self.set_immutable(false);
            }
        }
    }

    /// Creates a template on each file system with an immutable flag here: that of temporary files, and tmpfs.
    fn templates_with_flag() -> Vec<Template> {
        let capabilities = rustix::thread::capabilities(None).unwrap().effective;
        let folders = [std::env::temp_dir(), "/dev/shm".into()];
        let mut templates: Vec<_> = folders
            .iter()
            .map(|folder| Template::in_folder(folder, 0o640))
            .collect();
        templates.retain(|template| flags(template.file.as_fd()).is_ok());
        if !capabilities.contains(CapabilitySet::LINUX_IMMUTABLE) {
            skip(Need::Capabilities(CapabilitySet::LINUX_IMMUTABLE));
            return Vec::new();
        }
        if templates.is_empty() {
            skip("no file system here has an immutable flag");
        }
        templates
    }

    fn give_up(capability: CapabilitySet) {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(capability);
        rustix::thread::set_capabilities(None, sets).unwrap();
    }

    fn reloaded(applied: Applied) -> Applied {
        serde_json::from_str(&serde_json::to_string(&applied).unwrap()).unwrap()
    }

    #[test]
    fn readonly_takes_the_write_permissions_away_and_gives_back_those_that_there_were() {
        for (before, meanwhile) in [(0o666, 0o444), (0o640, 0o440), (0o444, 0o444), (0o4751, 0o4551)] {
            let template = Template::with_mode(before);
            let modified = template.modified();
            let applied = apply(template.file.as_fd(), Protection::Readonly).unwrap();
            assert_eq!(template.mode(), meanwhile, "{before:o}");
            assert_eq!(template.modified(), modified);
            assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
            assert_eq!(template.mode(), before);
            assert_eq!(template.modified(), modified);
            // Undone already.
            assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
            assert_eq!(template.mode(), before);
        }
    }

    #[test]
    fn a_mode_that_somebody_has_changed_since_is_left_alone() {
        let template = Template::with_mode(0o644);
        let applied = apply(template.file.as_fd(), Protection::Readonly).unwrap();
        template
            .file
            .set_permissions(std::fs::Permissions::from_mode(0o400))
            .unwrap();
        assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::ChangedSince);
        assert_eq!(template.mode(), 0o400);
    }

    #[test]
    fn an_immutable_file_cannot_be_written_or_removed_until_that_is_undone() {
        for template in templates_with_flag() {
            let modified = template.modified();
            let applied = apply(template.file.as_fd(), Protection::Immutable).unwrap();
            assert!(template.is_immutable());
            let refused = File::options().write(true).open(template.path()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            let refused = std::fs::remove_file(template.path()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);

            assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
            assert_eq!(template.modified(), modified);
            File::options().write(true).open(template.path()).unwrap();
            assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
        }
    }

    #[test]
    fn a_file_that_was_immutable_before_stays_so() {
        for template in templates_with_flag() {
            template.set_immutable(true);
            let applied = apply(template.file.as_fd(), Protection::Immutable).unwrap();
            assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
            assert!(template.is_immutable());
        }
    }

    #[test]
    fn what_was_read_back_undoes_what_a_killed_process_had_done_or_only_planned() {
        let mut all = vec![(Template::with_mode(0o660), Protection::Readonly)];
        for template in templates_with_flag() {
            all.push((template, Protection::Immutable));
        }
        for (template, protection) in all {
            let modes = (template.mode(), template.modified());
            let planned = reloaded(Applied::plan(template.file.as_fd(), protection).unwrap());
            assert_eq!(planned.undo_at(&template.path()).unwrap(), Undone::Restored);
            planned.enforce(template.file.as_fd()).unwrap();
            assert_eq!(reloaded(planned).undo_at(&template.path()).unwrap(), Undone::Restored);
            assert_eq!((template.mode(), template.modified()), modes);
            std::fs::remove_file(template.path()).unwrap();
            assert_eq!(planned.undo_at(&template.path()).unwrap(), Undone::Gone);
        }
    }

    #[test]
    fn another_file_in_its_place_is_left_alone() {
        let template = Template::with_mode(0o644);
        let applied = apply(template.file.as_fd(), Protection::Readonly).unwrap();
        let other = template.dir.path().join("other");
        std::fs::write(&other, "precious").unwrap();
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o444)).unwrap();
        std::fs::rename(&other, template.path()).unwrap();
        assert!(matches!(
            applied.undo_at(&template.path()),
            Err(ProtectError::OtherFile { .. })
        ));
        assert_eq!(std::fs::metadata(template.path()).unwrap().mode() & 0o7777, 0o444);
        // The protection of the open file can still be undone.
        assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
    }

    /// The state after a restart of a host whose run dir was on tmpfs.
    #[test]
    fn what_is_left_of_a_protection_whose_note_was_lost_is_taken_over() {
        let mut all = vec![(Template::with_mode(0o660), Protection::Readonly)];
        for template in templates_with_flag() {
            all.push((template, Protection::Immutable));
        }
        for (template, protection) in all {
            for next in [Protection::None, protection] {
                let file = template.file.as_fd();
                let lost = apply(file, protection).unwrap();
                assert!(is_left(file), "{protection:?}");
                let found = Applied::plan(file, next).unwrap();
                assert_eq!(found, lost);
                found.enforce(file).unwrap();
                assert_eq!(found.undo(file).unwrap(), Undone::Restored);
                assert_eq!(template.mode() & 0o600, 0o600, "{protection:?}");
                assert!(!is_left(file));
                assert!(Applied::plan(file, Protection::None).unwrap().is_nothing());
            }
        }
    }

    #[test]
    fn a_mark_says_nothing_of_another_file_or_a_protection_of_somebody_else() {
        for template in templates_with_flag() {
            let file = template.file.as_fd();
            // Another process changes the mode.
            let applied = apply(file, Protection::Readonly).unwrap();
            template
                .file
                .set_permissions(std::fs::Permissions::from_mode(0o400))
                .unwrap();
            assert!(!is_left(file));
            assert_eq!(applied.undo(file).unwrap(), Undone::ChangedSince);
            // The mark of another file, copied to an immutable file.
            let mut mark = Mark {
                inode: rustix::fs::fstat(file).unwrap().st_ino + 1,
                born: born(file),
                change: Change::Immutable { set_before: false },
            };
            let set = |mark: &Mark| {
                let mark = serde_json::to_vec(mark).unwrap();
                rustix::fs::fsetxattr(file, MARKS[1], &mark, XattrFlags::empty()).unwrap();
            };
            set(&mark);
            template.set_immutable(true);
            assert!(!is_left(file));
            template.set_immutable(false);
            mark.inode -= 1;
            set(&mark);
            assert!(!is_left(file), "not immutable");
            template.set_immutable(true);
            assert!(is_left(file));
        }
    }

    #[test]
    fn no_protection_changes_nothing() {
        let template = Template::with_mode(0o644);
        let applied = apply(template.file.as_fd(), Protection::None).unwrap();
        assert_eq!(template.mode(), 0o644);
        assert_eq!(applied.undo(template.file.as_fd()).unwrap(), Undone::Restored);
    }

    #[test]
    fn a_file_of_somebody_else_needs_a_capability() {
        if !rustix::process::geteuid().is_root() {
            skip((Need::Root, "to have a file of somebody else"));
            return;
        }
        let template = Template::with_mode(0o644);
        std::os::unix::fs::fchown(&template.file, Some(65534), None).unwrap();
        give_up(CapabilitySet::FOWNER);
        let error = apply(template.file.as_fd(), Protection::Readonly).unwrap_err();
        assert!(matches!(error, ProtectError::Permission), "{error}");
        assert_eq!(template.mode(), 0o644);
    }

    #[test]
    fn without_the_capability_for_the_flag_nothing_is_changed() {
        let templates = templates_with_flag();
        give_up(CapabilitySet::LINUX_IMMUTABLE);
        for template in &templates {
            let error = apply(template.file.as_fd(), Protection::Immutable).unwrap_err();
            assert!(matches!(error, ProtectError::ImmutablePermission), "{error}");
            assert!(!template.is_immutable());
        }
    }

    #[test]
    fn a_file_system_without_the_flag_is_told() {
        // procfs has no immutable flag.
        let file = File::open("/proc/self/status").unwrap();
        let error = apply(file.as_fd(), Protection::Immutable).unwrap_err();
        assert!(matches!(error, ProtectError::NoImmutableFlag), "{error}");
    }
}
