//! Owner and mode of a memory file. The owner of a folder with a hard link of it may change them.

use std::os::fd::AsFd;

use rustix::fs::Mode;
use serde::{Deserialize, Serialize};

/// Owner, group and mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ownership {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Ownership {
    /// Returns those of the open file `file`.
    ///
    /// # Errors
    ///
    /// `fstat(2)` fails.
    pub(crate) fn of(file: impl AsFd) -> rustix::io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        Ok(Self {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: Mode::from_raw_mode(stat.st_mode).bits(),
        })
    }

    /// Describes how `now` differs; `None` if it does not. Removed write permissions do not count, since the daemon
    /// removes them to protect a file.
    pub(crate) fn difference(&self, now: &Self) -> Option<String> {
        let writable = (Mode::WUSR | Mode::WGRP | Mode::WOTH).bits();
        let mut differences = Vec::new();
        if (now.uid, now.gid) != (self.uid, self.gid) {
            differences.push(format!(
                "its owner was {}:{} and is {}:{}",
                self.uid, self.gid, now.uid, now.gid
            ));
        }
        if (now.mode | writable) != (self.mode | writable) || now.mode & writable & !self.mode != 0 {
            differences.push(format!("its mode was {:o} and is {:o}", self.mode, now.mode));
        }
        (!differences.is_empty()).then(|| differences.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_and_mode_are_compared_but_for_what_protects() {
        let before = Ownership {
            uid: 1,
            gid: 2,
            mode: 0o644,
        };
        let now = |uid, gid, mode| before.difference(&Ownership { uid, gid, mode });
        assert_eq!(now(1, 2, 0o644), None);
        assert_eq!(now(1, 2, 0o444), None, "write permissions taken away");
        assert_eq!(now(3, 2, 0o644).unwrap(), "its owner was 1:2 and is 3:2");
        assert_eq!(now(1, 2, 0o664).unwrap(), "its mode was 644 and is 664");
        assert_eq!(now(1, 2, 0o600).unwrap(), "its mode was 644 and is 600");
        assert_eq!(
            now(1, 0, 0o4644).unwrap(),
            "its owner was 1:2 and is 1:0; its mode was 644 and is 4644"
        );
    }
}
