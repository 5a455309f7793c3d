//! The version of a Firecracker binary. The binary is not trusted: it gets little time, and only a version is taken
//! from its output.

use std::io::{self, ErrorKind, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal};

/// Time for `--version`, which takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of output that are read.
const LONGEST_ANSWER: u64 = 4096;

/// Major, minor, patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

/// Runs `command` with `--version`. Returns the version of Firecracker in its output, if there is one.
///
/// # Errors
///
/// The program cannot be started, or does not answer in time.
pub(crate) fn version(mut command: Command) -> io::Result<Option<Version>> {
    command.arg("--version");
    Ok(Version::find(&answer(command, PATIENCE)?))
}

impl Version {
    /// Finds the line `Firecracker v1.12.1`, with or without more text after the version.
    fn find(said: &str) -> Option<Self> {
        let version = said.lines().find_map(|line| line.strip_prefix("Firecracker v"))?;
        let mut parts = version.splitn(3, '.');
        let mut next = || {
            let part = parts.next()?;
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse().ok()
        };
        Some(Self(next()?, next()?, next()?))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Returns the program's stdout, up to [`LONGEST_ANSWER`]. Kills the program and its children after that much output,
/// at the end of stdout, or when time is up.
///
/// # Errors
///
/// The program cannot be started, or does not answer in time.
fn answer(mut command: Command, patience: Duration) -> io::Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    let answer = match child.stdout.take() {
        Some(stdout) => read(stdout, patience),
        None => Err(io::Error::other("it has no stdout")),
    };
    end(&mut child);
    Ok(String::from_utf8_lossy(&answer?).into_owned())
}

/// Reads on a thread of its own: a process that holds the pipe may neither write nor close it.
fn read(stdout: ChildStdout, patience: Duration) -> io::Result<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("firecracker".to_owned())
        .spawn(move || {
            let mut bytes = Vec::new();
            let read = stdout.take(LONGEST_ANSWER).read_to_end(&mut bytes);
            // The receiver may be gone.
            let _ = sender.send(read.map(|_| bytes));
        })?;
    receiver
        .recv_timeout(patience)
        .unwrap_or_else(|_| Err(io::Error::new(ErrorKind::TimedOut, "no answer in time")))
}

/// Kills the whole process group. Its number cannot be reused before the child has been waited for.
fn end(child: &mut Child) {
    let _ = rustix::process::kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags};
    use rustix::fs::{CWD, FileType, Mode, OFlags};

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn versions_are_found_in_what_firecracker_says() {
        for (said, version) in [
            (
                "Firecracker v1.12.1\n\nSupported snapshot data format versions: 6.0.0\n",
                Some(Version(1, 12, 1)),
            ),
            ("Firecracker v1.7.0-dirty\n", Some(Version(1, 7, 0))),
            ("Firecracker v1.16.0.7\n", Some(Version(1, 16, 0))),
            (
                "2026-01-01T00:00:00 starting\nFirecracker v1.13.0\n",
                Some(Version(1, 13, 0)),
            ),
            ("Firecracker v1.12\n", None),
            ("Firecracker v1..2\n", None),
            ("Firecracker v-1.2.3\n", None),
            ("Firecracker v99999999999.0.0\n", None),
            ("Firecracker v", None),
            ("Mozilla Firefox 140.0\n", None),
            ("", None),
        ] {
            assert_eq!(Version::find(said), version, "{said:?}");
        }
    }

    #[test]
    fn endless_talk_is_cut_off() {
        let said = answer(shell("exec yes Firecracker v1.12.1"), Duration::from_mins(1)).unwrap();
        assert_eq!(said.len() as u64, LONGEST_ANSWER);
        assert_eq!(Version::find(&said), Some(Version(1, 12, 1)));
    }

    #[test]
    fn bytes_that_are_no_text_are_harmless() {
        let said = answer(shell(r"printf '\377\376\000Firecracker v1.12.1'"), PATIENCE * 12).unwrap();
        assert_eq!(Version::find(&said), None);
    }

    #[test]
    fn who_does_not_answer_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("held");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0).unwrap();
        // The child of the shell holds the FIFO, and the shell's stdout.
        let script = format!("exec 3<>{}; sleep 600 & echo Firecracker v1.12.1", path.display());
        let error = answer(shell(&script), Duration::from_millis(500)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let fifo = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        // The FIFO has an end once no process holds it. The kill takes effect later, so wait for that.
        while rustix::io::read(&fifo, &mut [0; 1]) != Ok(0) {
            rustix::event::poll(&mut [PollFd::new(&fifo, PollFlags::IN)], None).unwrap();
        }
    }
}
