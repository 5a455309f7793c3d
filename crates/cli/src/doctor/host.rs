//! Files in which the kernel shows its version and settings.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::finding::Finding;

/// A host, seen through its files: those below `/`, or made-up ones below a folder of a test.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    /// This host.
    pub(super) fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
        }
    }

    /// The place of this absolute path.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file, trimmed.
    pub(super) fn text(&self, path: &str) -> io::Result<String> {
        Ok(fs::read_to_string(self.path(path))?.trim().to_owned())
    }

    /// The number that a file consists of.
    pub(super) fn number(&self, path: &str) -> io::Result<u64> {
        let text = self.text(path)?;
        text.parse().map_err(|_| {
            let shown: String = text.chars().take(40).collect();
            io::Error::new(io::ErrorKind::InvalidData, format!("{shown:?} is no number"))
        })
    }
}

/// The finding if this file cannot be read.
pub(super) fn unknown(check: &'static str, path: impl AsRef<Path>, error: &io::Error) -> Finding {
    let path = path.as_ref().display();
    Finding::warn(
        check,
        format!("cannot tell: {path}: {error}"),
        format!("make {path} readable: mount /proc or /sys, and let this user read it"),
    )
}

/// A host that consists of these files.
#[cfg(test)]
pub(super) fn made_up(files: &[(&str, &str)]) -> (Host, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let host = Host {
        root: folder.path().to_owned(),
    };
    for (path, text) in files {
        let path = host.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    (host, folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_and_anything_else_is_an_error() {
        let (host, _folder) = made_up(&[("/proc/sys/vm/a", "17\n"), ("/proc/sys/vm/b", "x\n")]);
        assert_eq!(host.number("/proc/sys/vm/a").unwrap(), 17);
        let error = host.number("/proc/sys/vm/b").unwrap_err();
        assert_eq!(error.to_string(), "\"x\" is no number");
        assert_eq!(
            host.number("/proc/sys/vm/c").unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
