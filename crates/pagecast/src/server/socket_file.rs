//! A listening unix socket and its file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::error::Error;

/// The longest path of a unix socket in bytes (`sun_path` of `unix(7)`, less its final zero).
const LONGEST_PATH: usize = 107;

/// How many connections wait to be accepted; the kernel may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// A socket that listens at a path, which it made and takes away again.
#[derive(Debug)]
pub(super) struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file we made: whatever else is at the path is not ours to remove.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, mode 0600, for `user` and `group` where given. A socket file there that nobody listens at is
    /// replaced; anything else is left alone and refused.
    pub(super) fn bind(path: &Path, user: Option<u32>, group: Option<u32>) -> Result<Self, Error> {
        if path.as_os_str().len() > LONGEST_PATH {
            return Err(Error::SocketPath {
                path: path.to_owned(),
                reason: "it is longer than the 107 bytes that unix(7) allows",
            });
        }
        let failed = |source| Error::Socket {
            path: path.to_owned(),
            source,
        };
        let _guard = lock_directory(path).map_err(failed)?;
        clear_stale(path)?;
        let listener = listen(path).map_err(failed)?;
        let set_up = || -> io::Result<(u64, u64)> {
            if user.is_some() || group.is_some() {
                std::os::unix::fs::chown(path, user, group)?;
            }
            let metadata = std::fs::symlink_metadata(path)?;
            Ok((metadata.dev(), metadata.ino()))
        };
        match set_up() {
            Ok(identity) => Ok(Self {
                listener,
                path: path.to_owned(),
                identity,
            }),
            Err(error) => {
                let _ = std::fs::remove_file(path);
                Err(failed(error))
            }
        }
    }

    /// The next connection, if one waits. Close-on-exec.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        Ok(stream)
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be that no file descriptor is left for the lock. The file is ours to remove all the same: we still
        // listen, so no server replaces it.
        let _guard = lock_directory(&self.path);
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A socket that listens at `path`, which nobody but its owner can ever connect to: Linux takes the mode of the file from
/// the socket, so it is set before there is a file.
fn listen(path: &Path) -> io::Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Looking at a path, removing it and binding it are three calls: this lock on its directory makes them one among all
/// servers, so that two cannot take away each other's socket. Gone when closed; leaves no file.
fn lock_directory(path: &Path) -> io::Result<OwnedFd> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = rustix::fs::open(
        directory,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}

/// Removes a socket file at `path` that nobody listens at.
fn clear_stale(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::FileTypeExt;

    let failed = |source| Error::Socket {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            return Err(Error::SocketPath {
                path: path.to_owned(),
                reason: "something that is not a socket is there",
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match probe(path) {
        // Nobody has it open.
        Err(rustix::io::Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(failed),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        // EPROTOTYPE, or it cannot be told: take it that somebody is there.
        _ => Err(Error::SocketInUse { path: path.to_owned() }),
    }
}

/// Finds out whether somebody has the socket at `path`, without being noticed: a page server would take a connection
/// for the one VMM that it waits for. A datagram socket cannot connect to a stream socket, but the kernel only says so
/// (`EPROTOTYPE`) where there is one, and `ECONNREFUSED` where only the file is left.
fn probe(path: &Path) -> rustix::io::Result<()> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = SocketFile::bind(&path, None, None).unwrap();
        assert!(matches!(
            SocketFile::bind(&path, None, None),
            Err(Error::SocketInUse { .. })
        ));
        drop(first);
        assert!(!path.exists());
        // What a server leaves that was killed.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        SocketFile::bind(&path, None, None).unwrap();
    }

    #[test]
    fn only_our_own_file_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ours = SocketFile::bind(&path, None, None).unwrap();
        std::fs::remove_file(&path).unwrap();
        let theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
        drop(theirs);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(
            SocketFile::bind(&path, None, None),
            Err(Error::SocketPath { .. })
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_by_name() {
        let path = Path::new("/tmp").join("x".repeat(104));
        let error = SocketFile::bind(&path, None, None).unwrap_err();
        assert!(error.to_string().contains("107 bytes"), "{error}");
    }

    #[test]
    fn the_socket_is_for_its_owner_only_whatever_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _ = rustix::process::umask(Mode::empty());
        let _socket = SocketFile::bind(&path, None, None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }
}
