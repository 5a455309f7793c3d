//! Which Firecracker there is. It is somebody else's program, or something else under its name: it gets little time, and
//! of what it says only a version is believed.

use std::io::{self, ErrorKind, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal};

/// It answers in milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many bytes of its answer are read.
const LONGEST_ANSWER: u64 = 4096;

/// Major, minor, patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

/// What the program that `command` starts says to `--version`, if that is a version of Firecracker.
///
/// # Errors
///
/// Why it cannot be started, or that it took too long.
pub(crate) fn version(mut command: Command) -> io::Result<Option<Version>> {
    command.arg("--version");
    Ok(Version::find(&answer(command, PATIENCE)?))
}

impl Version {
    /// In the line `Firecracker v1.12.1`, with or without more after it.
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

/// What a program says on stdout, up to [`LONGEST_ANSWER`]. It and its children are killed when it has said that much,
/// closed its stdout, or run out of time.
///
/// # Errors
///
/// Why it cannot be started, or that it took too long.
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

/// Reads on a thread of its own: whoever holds the pipe may neither write nor close it.
fn read(stdout: ChildStdout, patience: Duration) -> io::Result<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("firecracker".to_owned())
        .spawn(move || {
            let mut bytes = Vec::new();
            let read = stdout.take(LONGEST_ANSWER).read_to_end(&mut bytes);
            // Nobody may be waiting any more.
            let _ = sender.send(read.map(|_| bytes));
        })?;
    receiver
        .recv_timeout(patience)
        .unwrap_or_else(|_| Err(io::Error::new(ErrorKind::TimedOut, "no answer in time")))
}

/// Kills it with all of its process group, which is ours to kill as long as it has not been waited for.
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
        // It has an end once nobody holds it. The kill is on its way, so wait for that as long as it takes.
        while rustix::io::read(&fifo, &mut [0; 1]) != Ok(0) {
            rustix::event::poll(&mut [PollFd::new(&fifo, PollFlags::IN)], None).unwrap();
        }
    }
}
