//! The folder of a run, and the folders that killed runs left.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use pagecast_firecracker::{API_SOCKET, kill_jailed, remove_cgroups};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::jail::UFFD_SOCKET;

/// Prefix of the names of all such folders.
const PREFIX: &str = "pagecast-run-";
/// Name of the file in each folder that says which daemon has the forks.
const RECORD: &str = "run.json";
/// Longest path of a unix socket in bytes, see `unix(7)`.
const LONGEST_SOCKET: usize = 107;
/// Attempts to create a folder, if another run takes it for an abandoned one.
const ATTEMPTS: usize = 5;

/// The folder of a running run, removed when dropped. Each microVM has a sub-folder, named after its fork.
///
/// It is locked while we live, so that other runs do not remove it.
#[derive(Debug)]
pub(crate) struct RunFolder {
    folder: TempDir,
    /// The middle part of the IDs.
    tag: String,
    /// The parent of the microVMs' folders.
    of_forks: PathBuf,
    _lock: File,
}

/// The content of the record.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// The control socket of the daemon.
    socket: PathBuf,
    /// Name of the sub-folder with the jails, if there are jails.
    #[serde(default)]
    jails: Option<PathBuf>,
}

impl Record {
    /// The parent of the forks' folders in the folder of a run.
    fn of_forks(&self, run: &Path) -> PathBuf {
        match &self.jails {
            Some(jails) => run.join(jails),
            None => run.to_owned(),
        }
    }
}

/// Why no folder could be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    #[error("cannot create a folder in {}: name another one with --dir", base.display())]
    Make {
        base: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the paths of API sockets in {} would be longer than {LONGEST_SOCKET} bytes: name a shorter one with --dir",
        base.display()
    )]
    TooLong { base: PathBuf },
}

impl RunFolder {
    /// Creates a folder in `base`, for the forks of the daemon at `socket`. If `jails` is given, the forks are jailed
    /// in that sub-folder.
    ///
    /// # Errors
    ///
    /// [`FolderError`].
    pub(crate) fn create(base: &Path, socket: &Path, jails: Option<&OsStr>) -> Result<Self, FolderError> {
        let failed = |source| FolderError::Make {
            base: base.to_owned(),
            source,
        };
        let base = std::path::absolute(base).map_err(failed)?;
        let mut attempts = 0;
        let folder = loop {
            attempts += 1;
            match Self::try_create(&base, socket, jails) {
                // Another run took it for an abandoned one, between its creation and its lock.
                Err(error) if error.kind() == ErrorKind::NotFound && base.is_dir() && attempts < ATTEMPTS => {}
                made => break made.map_err(failed)?,
            }
        };
        // The longest ID: IDs end with a number.
        let mut longest = folder.of_fork(&folder.id(u16::MAX.into(), 5));
        match jails {
            Some(_) => longest.extend(["root", UFFD_SOCKET]),
            None => longest.push(API_SOCKET),
        }
        if longest.as_os_str().len() > LONGEST_SOCKET {
            return Err(FolderError::TooLong { base });
        }
        Ok(folder)
    }

    fn try_create(base: &Path, socket: &Path, jails: Option<&OsStr>) -> io::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(base)?;
        let lock = File::open(folder.path())?;
        lock.lock()?;
        let record = Record {
            socket: std::path::absolute(socket)?,
            jails: jails.map(PathBuf::from),
        };
        fs::write(folder.path().join(RECORD), serde_json::to_vec(&record)?)?;
        let name = folder.path().file_name().unwrap_or_default().to_string_lossy();
        let tag = name.trim_start_matches(PREFIX).to_lowercase();
        Ok(Self {
            of_forks: record.of_forks(folder.path()),
            folder,
            tag,
            _lock: lock,
        })
    }

    /// The folder of a fork.
    pub(crate) fn of_fork(&self, id: &str) -> PathBuf {
        self.of_forks.join(id)
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The ID of a fork of this run. Its number is written with `digits` digits.
    pub(crate) fn id(&self, number: u32, digits: usize) -> String {
        format!("run-{}-{number:0digits$}", self.tag)
    }

    /// Removes the folder, the processes in its jails, and their cgroups.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub(crate) fn remove(self) -> io::Result<()> {
        kill_jailed(&self.of_forks)?;
        remove_cgroups(self.path().file_name().unwrap_or_default())?;
        self.folder.close()
    }

    /// Leaves the folder to the next run, as if we had been killed.
    pub(crate) fn leave(self) -> PathBuf {
        self.folder.keep()
    }
}

/// The folder of a run that was killed. Locked while this lives, so that no other run cleans it up.
#[derive(Debug)]
pub(crate) struct LeftFolder {
    path: PathBuf,
    _lock: File,
}

impl LeftFolder {
    /// The abandoned folders in `base` that this user owns.
    pub(crate) fn find(base: &Path) -> Vec<Self> {
        let entries = fs::read_dir(base).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()))
            .filter_map(|entry| Self::take(entry.path()))
            .collect()
    }

    fn take(path: PathBuf) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = File::from(open(&path, flags, Mode::empty()).ok()?);
        let metadata = folder.metadata().ok()?;
        let is_private = Mode::from_raw_mode(metadata.mode()).difference(Mode::RWXU).is_empty();
        if metadata.uid() != geteuid().as_raw() || !is_private || folder.try_lock().is_err() {
            return None;
        }
        Some(Self { path, _lock: folder })
    }

    /// The daemon's control socket, if the run had recorded it.
    pub(crate) fn socket(&self) -> Option<PathBuf> {
        Some(self.record()?.socket)
    }

    fn record(&self) -> Option<Record> {
        let record = fs::read(self.path.join(RECORD)).ok()?;
        serde_json::from_slice(&record).ok()
    }

    /// The IDs of its forks.
    pub(crate) fn ids(&self) -> Vec<String> {
        let folder = self.record().unwrap_or_default().of_forks(&self.path);
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Kills the jailed Firecrackers that are left. They survive the end of their run.
    ///
    /// # Errors
    ///
    /// Some do not end.
    pub(crate) fn end_jailed(&self) -> io::Result<()> {
        match self.record().and_then(|record| record.jails) {
            Some(jails) => kill_jailed(&self.path.join(jails)),
            None => Ok(()),
        }
    }

    /// Removes the folder and the cgroups of its run.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub(crate) fn remove(self) -> io::Result<()> {
        remove_cgroups(self.path.file_name().unwrap_or_default())?;
        fs::remove_dir_all(&self.path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const SOCKET: &str = "/run/pagecast/control.sock";

    fn create(base: &Path) -> RunFolder {
        RunFolder::create(base, Path::new(SOCKET), None).unwrap()
    }

    #[test]
    fn ids_are_ids() {
        let base = tempfile::tempdir().unwrap();
        let id = create(base.path()).id(7, 2);
        let (tag, number) = id.strip_prefix("run-").unwrap().rsplit_once('-').unwrap();
        assert_eq!(number, "07");
        assert!(
            tag.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()),
            "{id}"
        );
    }

    #[test]
    fn what_a_living_run_has_is_not_left() {
        let base = tempfile::tempdir().unwrap();
        let run = create(base.path());
        assert!(LeftFolder::find(base.path()).is_empty());
        run.remove().unwrap();
        assert_eq!(base.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_run_left_says_whose_it_was() {
        let base = tempfile::tempdir().unwrap();
        let path = create(base.path()).leave();
        fs::create_dir(path.join("run-a-1")).unwrap();
        let mut left = LeftFolder::find(base.path());
        assert_eq!(left.len(), 1);
        assert!(LeftFolder::find(base.path()).is_empty(), "one at a time cleans up");
        let left = left.remove(0);
        assert_eq!(left.socket().unwrap(), Path::new(SOCKET));
        assert_eq!(left.ids(), ["run-a-1"]);
        left.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn links_and_folders_that_others_can_write_to_are_not_ours() {
        let base = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), base.path().join("pagecast-run-link")).unwrap();
        let open = base.path().join("pagecast-run-open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(LeftFolder::find(base.path()).is_empty());
    }

    #[test]
    fn a_base_whose_sockets_would_have_too_long_paths_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let long = base.path().join("x".repeat(90));
        fs::create_dir(&long).unwrap();
        let error = RunFolder::create(&long, Path::new(SOCKET), None).unwrap_err();
        assert!(matches!(error, FolderError::TooLong { .. }), "{error}");
        assert_eq!(long.read_dir().unwrap().count(), 0, "nothing is left of the attempt");
    }

    #[test]
    fn a_base_that_is_not_there_is_named() {
        let error = RunFolder::create(Path::new("/nonexistent"), Path::new(SOCKET), None).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
