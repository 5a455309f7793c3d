//! The Firecracker binary, checked before anything is started.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::exec;
use crate::firecracker::{Version, version};

/// A Firecracker that runs on this host.
#[derive(Clone, Debug)]
pub(crate) struct Firecracker {
    /// Absolute path.
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
}

/// Why there is no usable Firecracker.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FirecrackerError {
    #[error("there is no `firecracker` on PATH: install it, or name it with --firecracker")]
    NotOnPath,
    #[error("there is no Firecracker at {}", path.display())]
    Missing {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a file that this user may execute", path.display())]
    NotExecutable { path: PathBuf },
    #[error("{} does not run, or does not print its version", path.display())]
    Silent {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not Firecracker: `--version` prints another name", path.display())]
    NotFirecracker { path: PathBuf },
}

impl Firecracker {
    /// Finds the named binary, or else the first on `PATH`.
    ///
    /// # Errors
    ///
    /// [`FirecrackerError`]: it is missing, cannot be run, or is another program.
    pub(crate) fn find(asked_for: Option<&Path>) -> Result<Self, FirecrackerError> {
        let path = match asked_for {
            Some(path) => path.to_owned(),
            None => std::env::var_os("PATH")
                .and_then(|paths| on_path(&paths))
                .ok_or(FirecrackerError::NotOnPath)?,
        };
        // Each Firecracker is started in a folder of its own.
        let path = path
            .canonicalize()
            .map_err(|source| FirecrackerError::Missing { path, source })?;
        if !is_executable(&path) {
            return Err(FirecrackerError::NotExecutable { path });
        }
        match version(exec::command(&path)) {
            Ok(Some(version)) => Ok(Self { path, version }),
            Ok(None) => Err(FirecrackerError::NotFirecracker { path }),
            Err(source) => Err(FirecrackerError::Silent { path, source }),
        }
    }
}

fn on_path(paths: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(paths)
        .map(|folder| folder.join("firecracker"))
        .find(|path| is_executable(path))
}

/// Returns `true` if `path` is a file that this user may execute.
pub(super) fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}
