//! A terminal, as the command sees it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;

use crate::command::text;

/// Our end of a terminal.
pub(crate) struct Terminal {
    ours: File,
}

impl Terminal {
    /// A new one, and the end for somebody else.
    pub(crate) fn open() -> (Self, OwnedFd) {
        let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        rustix::pty::unlockpt(&ours).unwrap();
        let name = rustix::pty::ptsname(&ours, Vec::new()).unwrap();
        let theirs = rustix::fs::open(
            OsStr::from_bytes(name.as_bytes()),
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        (Self { ours: ours.into() }, theirs)
    }

    /// What is written to it until nobody has the other end any more.
    pub(crate) fn read(mut self) -> String {
        let mut written = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.ours.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => written.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nobody has the other end any more.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => break,
                Err(error) => panic!("reading the terminal: {error}"),
            }
        }
        text(&written)
    }
}

/// What the command writes where its stdout is a terminal.
pub(crate) fn on_terminal(command: &mut Command) -> String {
    let (terminal, theirs) = Terminal::open();
    let mut child = command.stdout(theirs).stderr(Stdio::null()).spawn().unwrap();
    // The command holds its end of the terminal until it is given another.
    command.stdout(Stdio::null());
    let written = terminal.read();
    child.wait().unwrap();
    written
}
