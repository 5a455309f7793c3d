//! The run dir: the folder with all state of a daemon. One daemon at a time has it.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Prefix of files that are not yet written to their end. No template or fork has such a name.
const UNFINISHED: &str = ".new-";

/// The run dir, locked while this lives.
///
/// | name | content |
/// | --- | --- |
/// | `control.sock` | the control socket |
/// | `lock` | the daemon's lock, and its process ID |
/// | `templates/NAME.json` | a template, as it was added |
/// | `templates/NAME.mem` | its memory file, for forks with `file`: the same inode |
/// | `forks/ID.json` | a fork that the next daemon takes up |
/// | `forks/ID.sock` | the socket of a fork with `uffd` |
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

/// Why the run dir cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// Another daemon uses it.
    #[error("another daemon uses {}{}: stop it, or choose another --run-dir", path.display(), by(*pid))]
    Taken {
        /// Path of the run dir.
        path: PathBuf,
        /// Process ID of the other daemon, if known.
        pid: Option<u32>,
    },
    /// Another user owns it.
    #[error("{} belongs to user {owner}, but this runs as user {user}: choose another --run-dir", path.display())]
    Owner {
        /// Path of the run dir.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The user of this process.
        user: u32,
    },
    /// It cannot be created or used.
    #[error("cannot {what} {}: run as root, or choose another --run-dir", path.display())]
    Io {
        /// The operation that failed.
        what: &'static str,
        /// Path that it failed for.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

fn by(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

impl RunDir {
    /// Creates the folder if it is missing, and locks it. `shared` lets other users open files in it by name.
    ///
    /// # Errors
    ///
    /// [`RunDirError`].
    pub fn take(path: &Path, shared: bool) -> Result<Self, RunDirError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError::Io { what, path, source }
        };
        make_dir(path).map_err(failed("create the folder", path))?;
        let owner = std::fs::metadata(path).map_err(failed("look at", path))?.uid();
        let user = rustix::process::geteuid().as_raw();
        if owner != user {
            return Err(RunDirError::Owner {
                path: path.to_owned(),
                owner,
                user,
            });
        }
        let lock_path = path.join("lock");
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // A user who can open the file can lock it.
            .mode(0o600)
            .open(&lock_path)
            .map_err(failed("open", &lock_path))?;
        // An older version may have created it with another mode.
        lock.set_permissions(Permissions::from_mode(0o600))
            .map_err(failed("set the mode of", &lock_path))?;
        if let Err(error) = lock.try_lock() {
            return Err(match error {
                std::fs::TryLockError::WouldBlock => {
                    let mut pid = String::new();
                    // The process ID is for the error message only.
                    let _ = lock.take(16).read_to_string(&mut pid);
                    RunDirError::Taken {
                        path: path.to_owned(),
                        pid: pid.trim().parse().ok(),
                    }
                }
                std::fs::TryLockError::Error(source) => failed("lock", &lock_path)(source),
            });
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(failed("write", &lock_path))?;

        let mode = if shared { 0o711 } else { 0o700 };
        std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of", path))?;
        let this = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        for inner in ["templates", "forks"] {
            let inner = this.path.join(inner);
            make_dir(&inner).map_err(failed("create the folder", &inner))?;
            clear_unfinished(&inner).map_err(failed("clear", &inner))?;
        }
        Ok(this)
    }

    /// The path of the control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a template's memory file, for forks with `file`.
    pub fn template_mem(&self, name: &str) -> PathBuf {
        self.path.join("templates").join(format!("{name}.mem"))
    }

    /// The path of a fork's socket.
    pub fn fork_socket(&self, id: &str) -> PathBuf {
        self.path.join("forks").join(format!("{id}.sock"))
    }

    /// Saves a record for the next daemon.
    ///
    /// # Errors
    ///
    /// The record cannot be written. The earlier one stays.
    pub fn save(&self, what: Saved, name: &str, value: &impl Serialize) -> io::Result<()> {
        let path = self.saved(what, name);
        let folder = path.parent().unwrap_or(&self.path);
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)?;
        file.write_all(&encode(value)?)?;
        file.persist(path)?;
        Ok(())
    }

    /// Deletes a record, if it exists.
    ///
    /// # Errors
    ///
    /// The record exists and cannot be deleted.
    pub fn forget(&self, what: Saved, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.saved(what, name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns all records of a kind, sorted by name. A record that cannot be read is an error beside its name.
    ///
    /// # Errors
    ///
    /// The folder cannot be listed.
    pub fn saved_values<T: DeserializeOwned>(&self, what: Saved) -> io::Result<Vec<(String, io::Result<T>)>> {
        let mut values = Vec::new();
        for entry in std::fs::read_dir(self.path.join(what.folder()))? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            let value = std::fs::read(self.saved(what, name)).and_then(|bytes| Ok(decode(&bytes)?));
            values.push((name.to_owned(), value));
        }
        values.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(values)
    }

    fn saved(&self, what: Saved, name: &str) -> PathBuf {
        self.path.join(what.folder()).join(format!("{name}.json"))
    }
}

/// The content of a file.
pub(crate) fn encode(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(value)
}

/// Parses the output of [`encode`].
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(bytes)
}

/// Kinds of records.
#[derive(Clone, Copy, Debug)]
pub enum Saved {
    /// A template.
    Template,
    /// A fork.
    Fork,
}

impl Saved {
    fn folder(self) -> &'static str {
        match self {
            Self::Template => "templates",
            Self::Fork => "forks",
        }
    }
}

/// Creates a folder with mode 0700, and its parents with the usual mode.
fn make_dir(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        std::fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made,
    }
}

/// Deletes files that a killed daemon had not written to their end.
fn clear_unfinished(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_daemon_has_it_and_the_other_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = RunDir::take(&path, false).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        match RunDir::take(&path, false) {
            Err(RunDirError::Taken { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        RunDir::take(&path, true).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o711);
    }

    /// A user who can open a file can lock it.
    #[test]
    fn nobody_else_can_open_its_lock_also_where_an_older_version_has_made_it() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("lock");
        let mode = || std::fs::metadata(&lock).unwrap().mode() & 0o777;
        drop(RunDir::take(dir.path(), true).unwrap());
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&lock, Permissions::from_mode(0o644)).unwrap();
        drop(RunDir::take(dir.path(), true).unwrap());
        assert_eq!(mode(), 0o600);
    }

    #[test]
    fn what_was_being_written_when_a_daemon_was_killed_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        drop(RunDir::take(dir.path(), false).unwrap());
        let half = dir.path().join("forks/.new-abc");
        std::fs::write(&half, "{").unwrap();
        let run_dir = RunDir::take(dir.path(), false).unwrap();
        assert!(!half.exists());
        assert_eq!(run_dir.saved_values::<u32>(Saved::Fork).unwrap().len(), 0);
    }

    #[test]
    fn what_is_saved_is_found_again_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::take(dir.path(), false).unwrap();
        run_dir.save(Saved::Fork, "b", &2).unwrap();
        run_dir.save(Saved::Fork, "a", &1).unwrap();
        run_dir.save(Saved::Fork, "gone", &3).unwrap();
        run_dir.forget(Saved::Fork, "gone").unwrap();
        run_dir.forget(Saved::Fork, "gone").unwrap();
        std::fs::write(dir.path().join("forks/c.json"), "{").unwrap();
        let values = run_dir.saved_values::<u32>(Saved::Fork).unwrap();
        let values: Vec<_> = values
            .iter()
            .map(|(name, value)| (&**name, value.as_ref().ok()))
            .collect();
        assert_eq!(values, [("a", Some(&1)), ("b", Some(&2)), ("c", None)]);
    }
}
