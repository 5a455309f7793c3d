//! A listening unix socket and its file.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::error::Error;

/// The longest path of a unix socket in bytes (`sun_path` of `unix(7)`, less its final zero).
const LONGEST_PATH: usize = 107;

/// The most connections that wait to be accepted; the kernel may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// How long to wait for the lock of a folder before giving up on a stale socket file there.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A socket that listens at a path. It creates its file, and removes it again.
///
/// Creating the file is one step (`bind` fails if anything is there), and so needs no lock. Replacing a file that a
/// dead server has left takes a lock, for a short time.
#[derive(Debug)]
pub(super) struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// The file that we created: another file at the path must not be removed.
    identity: Identity,
}

/// Device and inode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Listens at `path` with mode 0600, for `user` and `group` if given. Replaces a socket file there if no process
    /// listens at it. Refuses any other file, and leaves it alone.
    pub(super) fn bind(path: &Path, user: Option<u32>, group: Option<u32>) -> Result<Self, Error> {
        if path.as_os_str().len() > LONGEST_PATH {
            return Err(Error::SocketPath {
                path: path.to_owned(),
                reason: "it is longer than the 107 bytes that unix(7) allows",
            });
        }
        let listener = match listen(path) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path)?;
                listen(path)
            }
            other => other,
        };
        let listener = listener.map_err(|errno| match errno {
            // Another server came first.
            Errno::ADDRINUSE => Error::SocketInUse { path: path.to_owned() },
            errno => failed(path, errno),
        })?;
        let file = Pinned::open(path)
            .and_then(|file| file.ok_or(Errno::NOENT))
            .map_err(|errno| failed(path, errno))?;
        let this = Self {
            listener,
            path: path.to_owned(),
            identity: file.identity,
        };
        if user.is_some() || group.is_some() {
            file.give_to(user, group).map_err(|errno| failed(path, errno))?;
        }
        Ok(this)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection, if one waits. Its file descriptor is close-on-exec.
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
        // No server replaces the file in between: we still listen.
        let is_ours = std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| {
            self.identity
                == Identity {
                    device: metadata.dev(),
                    inode: metadata.ino(),
                }
        });
        if is_ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn failed(path: &Path, errno: Errno) -> Error {
    Error::Socket {
        path: path.to_owned(),
        source: errno.into(),
    }
}

/// Creates a socket that listens at `path`, which only its owner can ever connect to. Linux takes the mode of the file
/// from the socket, so the mode is set before there is a file.
fn listen(path: &Path) -> rustix::io::Result<UnixListener> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// A file that is held open, so that no other file gets its inode number meanwhile.
struct Pinned {
    file: OwnedFd,
    is_socket: bool,
    identity: Identity,
}

impl Pinned {
    /// The file at `path`; symbolic links are not followed. `None` if there is none.
    fn open(path: &Path) -> rustix::io::Result<Option<Self>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let stat = rustix::fs::fstat(&file)?;
        Ok(Some(Self {
            is_socket: FileType::from_raw_mode(stat.st_mode) == FileType::Socket,
            identity: Identity {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            file,
        }))
    }

    /// Changes the owner of this socket, whatever is at its path by now.
    fn give_to(&self, user: Option<u32>, group: Option<u32>) -> rustix::io::Result<()> {
        if !self.is_socket {
            return Err(Errno::NOTSOCK);
        }
        let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
        rustix::fs::chownat(&self.file, c"", user, group, AtFlags::EMPTY_PATH)
    }

    /// Returns `true` if a process has this socket open. If not, no process ever will again.
    ///
    /// The check is not noticed: a datagram socket cannot connect to a stream socket. The kernel returns `EPROTOTYPE`
    /// if there is a stream socket, and `ECONNREFUSED` if only the file is left.
    fn is_in_use(&self) -> bool {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

        let connected = || {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
            let itself = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::net::connect(&socket, &SocketAddrUnix::new(itself)?)
        };
        // If that is not certain, assume that a process listens.
        connected() != Err(Errno::CONNREFUSED)
    }
}

/// Removes a socket file at `path` that no process has open any more.
fn remove_stale(path: &Path) -> Result<(), Error> {
    // Checking a path and removing it are two calls. The lock makes them one step among all servers, so that none
    // removes a file that another has just created.
    let _lock = lock_folder(path).map_err(|errno| match errno {
        Errno::WOULDBLOCK => Error::SocketPath {
            path: path.to_owned(),
            reason: "another process has locked its folder, so the file of a dead server there cannot be replaced",
        },
        errno => failed(path, errno),
    })?;
    let Some(stale) = Pinned::open(path).map_err(|errno| failed(path, errno))? else {
        return Ok(());
    };
    if !stale.is_socket {
        return Err(Error::SocketPath {
            path: path.to_owned(),
            reason: "there is another file than a socket",
        });
    }
    if stale.is_in_use() {
        return Err(Error::SocketInUse { path: path.to_owned() });
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed(path, errno)),
    }
}

/// Locks the folder of `path`, waiting no longer than [`LOCK_PATIENCE`]: other users who can open it can lock it too.
/// Unlocked when closed; leaves no file.
fn lock_folder(path: &Path) -> rustix::io::Result<OwnedFd> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOCK_PAUSE),
            Err(errno) => return Err(errno),
        }
    }
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
        // A killed server leaves such a file.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        SocketFile::bind(&path, None, None).unwrap();
    }

    #[test]
    fn a_folder_that_somebody_has_locked_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let folder = std::fs::File::open(dir.path()).unwrap();
        rustix::fs::flock(&folder, FlockOperation::LockExclusive).unwrap();
        let path = dir.path().join("s");
        let (done, is_done) = std::sync::mpsc::channel();
        let patience = Duration::from_secs(30);
        std::thread::spawn(move || {
            drop(SocketFile::bind(&path, None, None).unwrap());
            done.send(path.exists()).unwrap();
            // The file of a killed server is not replaced, and the error says why.
            drop(UnixListener::bind(&path).unwrap());
            let refused = SocketFile::bind(&path, None, None);
            let reason = refused.unwrap_err().to_string();
            assert!(reason.contains("locked its folder"), "{reason}");
            done.send(path.exists()).unwrap();
        });
        assert_eq!(is_done.recv_timeout(patience), Ok(false), "made and removed");
        assert_eq!(is_done.recv_timeout(patience), Ok(true), "left alone");
        drop(folder);
    }

    #[test]
    fn of_servers_that_find_a_stale_file_at_once_one_gets_the_path_and_can_be_reached() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(4);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            start.wait();
                            SocketFile::bind(&path, None, None)
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (winners, losers): (Vec<_>, Vec<_>) = bound.into_iter().partition(Result::is_ok);
            for loser in losers {
                // The second on a machine that is too busy.
                assert!(
                    matches!(loser, Err(Error::SocketInUse { .. } | Error::SocketPath { .. })),
                    "{loser:?}"
                );
            }
            let [Ok(winner)] = &winners[..] else {
                panic!("{winners:?}")
            };
            let _client = UnixStream::connect(&path).unwrap();
            winner.accept().unwrap();
            drop(winners);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
        }
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
