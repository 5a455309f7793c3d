//! The run dir of the daemon.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

use super::finding::Finding;

/// The longest path of a unix socket in bytes (`sun_path` of `unix(7)`, less its final zero).
const LONGEST_SOCKET: usize = 107;
/// The socket in the run dir.
const SOCKET: &str = "control.sock";

/// What exists at the path.
#[derive(Debug)]
enum Place {
    Folder {
        /// Permission bits.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Whether this user can create files in it.
        writable: io::Result<()>,
    },
    /// The path does not exist. `parent` is the nearest folder that does.
    Missing {
        parent: PathBuf,
        writable: io::Result<()>,
    },
    /// The path is no folder.
    NoFolder,
    Unknown(io::Error),
}

pub(super) fn probe(path: &Path) -> Finding {
    let own = rustix::process::geteuid().as_raw();
    finding(path, look(path), own)
}

fn look(path: &Path) -> Place {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Place::Folder {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            writable: writable(path),
        },
        Ok(_) => Place::NoFolder,
        // A link to a missing file is in the way.
        Err(error) if error.kind() == ErrorKind::NotFound && fs::symlink_metadata(path).is_ok() => Place::NoFolder,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let parent = nearest_folder(path);
            let writable = writable(&parent);
            Place::Missing { parent, writable }
        }
        Err(error) => Place::Unknown(error),
    }
}

fn nearest_folder(path: &Path) -> PathBuf {
    let above = path.ancestors().skip(1);
    let existing = above
        .filter(|folder| !folder.as_os_str().is_empty())
        .find(|folder| folder.exists());
    existing.unwrap_or(Path::new(".")).to_owned()
}

/// Checks whether this user can create files there. Fails, for instance, on a file system mounted read-only.
fn writable(folder: &Path) -> io::Result<()> {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    Ok(rustix::fs::accessat(CWD, folder, access, AtFlags::EACCESS)?)
}

/// `own` is our user ID.
fn finding(path: &Path, place: Place, own: u32) -> Finding {
    let check = "run_dir";
    let shown = path.display();
    let length = path.join(SOCKET).as_os_str().as_bytes().len();
    if length > LONGEST_SOCKET {
        return Finding::fail(
            check,
            format!("{shown}: the path of its socket would have {length} bytes, and the maximum is {LONGEST_SOCKET}"),
            "choose a shorter --run-dir",
        );
    }
    let choose = "choose another with --run-dir";
    match place {
        Place::NoFolder => Finding::fail(
            check,
            format!("{shown} is not a folder"),
            format!("remove it, or {choose}"),
        ),
        Place::Unknown(error) => Finding::fail(check, format!("{shown}: {error}"), choose),
        Place::Missing { parent, writable } => {
            let parent = parent.display();
            match writable {
                Ok(()) => Finding::ok(check, format!("{shown} can be created in {parent}")),
                Err(error) => Finding::fail(
                    check,
                    format!("{shown} is missing and cannot be created in {parent}: {error}"),
                    format!("create it as root (install -d -m 700 -o {own} {shown}), or {choose}"),
                ),
            }
        }
        Place::Folder {
            writable: Err(error), ..
        } => Finding::fail(
            check,
            format!("{shown} is not writable: {error}"),
            format!("give it to this user (chown {own} {shown}), or {choose}"),
        ),
        Place::Folder { uid, .. } if uid != own => Finding::warn(
            check,
            format!("{shown} belongs to user {uid}, who can remove its files"),
            format!("chown {own} {shown}, or {choose}"),
        ),
        Place::Folder { mode, .. } if mode & 0o077 != 0 => Finding::warn(
            check,
            format!("{shown} has mode {mode:o}: other users can read it"),
            format!("chmod 700 {shown}"),
        ),
        Place::Folder { .. } => Finding::ok(check, format!("{shown} is writable")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::super::finding::Status;
    use super::*;

    const OWN: u32 = 1000;

    fn judge(place: Place) -> Finding {
        finding("/run/pagecast".as_ref(), place, OWN)
    }

    fn folder(mode: u32, uid: u32, writable: io::Result<()>) -> Place {
        Place::Folder { mode, uid, writable }
    }

    #[test]
    fn a_private_folder_of_ours_is_fine() {
        assert_eq!(judge(folder(0o700, OWN, Ok(()))).status(), Status::Ok);
        let open = judge(folder(0o755, OWN, Ok(())));
        assert_eq!(open.status(), Status::Warn);
        assert_eq!(open.parts().2, "chmod 700 /run/pagecast");
        let foreign = judge(folder(0o777, 7, Ok(())));
        assert_eq!(foreign.status(), Status::Warn);
        assert!(foreign.parts().2.starts_with("chown 1000 /run/pagecast"));
    }

    #[test]
    fn what_cannot_be_written_fails() {
        let closed = judge(folder(0o700, 0, Err(ErrorKind::PermissionDenied.into())));
        assert_eq!(closed.status(), Status::Fail);
        assert!(closed.parts().2.contains("chown 1000"));
        let missing = |writable| {
            judge(Place::Missing {
                parent: "/run".into(),
                writable,
            })
        };
        assert_eq!(
            missing(Ok(())).parts(),
            (Status::Ok, "/run/pagecast can be created in /run", "")
        );
        let not_to_be_made = missing(Err(ErrorKind::ReadOnlyFilesystem.into()));
        assert_eq!(not_to_be_made.status(), Status::Fail);
        assert!(
            not_to_be_made
                .parts()
                .2
                .contains("install -d -m 700 -o 1000 /run/pagecast")
        );
        assert_eq!(judge(Place::NoFolder).status(), Status::Fail);
        let unknown = judge(Place::Unknown(ErrorKind::PermissionDenied.into()));
        assert_eq!(unknown.status(), Status::Fail);
    }

    #[test]
    fn a_path_too_long_for_a_socket_fails() {
        let longest = "/".to_owned() + &"x".repeat(LONGEST_SOCKET - SOCKET.len() - 2);
        let judge = |path: &str| finding(path.as_ref(), folder(0o700, OWN, Ok(())), OWN).status();
        assert_eq!(judge(&longest), Status::Ok);
        assert_eq!(judge(&(longest + "x")), Status::Fail);
    }

    #[test]
    fn real_places_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("folder")).unwrap();
        fs::set_permissions(path("folder"), fs::Permissions::from_mode(0o750)).unwrap();
        fs::write(path("file"), "").unwrap();
        symlink("nowhere", path("link")).unwrap();
        assert!(matches!(look(&path("file")), Place::NoFolder));
        assert!(matches!(look(&path("link")), Place::NoFolder));
        assert!(matches!(look(&path("file/below")), Place::Unknown(_)));
        let Place::Folder { mode, uid, writable } = look(&path("folder")) else {
            panic!("this is a folder");
        };
        writable.unwrap();
        assert_eq!((mode, uid), (0o750, rustix::process::geteuid().as_raw()));
        let Place::Missing { parent, .. } = look(&path("folder/a/b")) else {
            panic!("nothing is there");
        };
        assert_eq!(parent, path("folder"));
        let Place::Missing { parent, .. } = look(Path::new("no-such-folder")) else {
            panic!("nothing is there");
        };
        assert_eq!(parent, Path::new("."));
    }
}
