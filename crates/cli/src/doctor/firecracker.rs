//! Which Firecracker there is. It is somebody else's program, or something else under its name: it gets little time, and
//! of what it says only a version is believed.

use std::io::{self, ErrorKind, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::finding::Finding;

/// It answers in milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many bytes of its answer are read.
const LONGEST_ANSWER: u64 = 4096;

/// Major, minor, patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32, u32);

/// The first to tell a page server the size of its pages, without which a fork is refused.
const NEEDED: Version = Version(1, 7, 0);

pub(super) fn probe(program: &Path) -> Finding {
    let mut command = Command::new(program);
    command.arg("--version");
    judge(program, &answer(command, PATIENCE))
}

fn judge(program: &Path, answer: &io::Result<String>) -> Finding {
    let check = "firecracker";
    let shown = program.display();
    let fix = "name the right one with --firecracker PATH, or install Firecracker 1.12 or newer";
    let said = match answer {
        Ok(said) => said,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Finding::warn(check, format!("{shown} is not found"), fix);
        }
        Err(error) => return Finding::warn(check, format!("{shown} --version: {error}"), fix),
    };
    match Version::find(said) {
        None => Finding::warn(
            check,
            format!("{shown} --version does not answer like a Firecracker"),
            fix,
        ),
        Some(version) if version < NEEDED => Finding::fail(
            check,
            format!(
                "{shown} is {version}: it does not tell a page server the size of its pages, so its forks are refused"
            ),
            format!("install Firecracker {NEEDED} or newer, or restore with its File backend"),
        ),
        Some(version) => Finding::ok(check, format!("{shown} is {version}")),
    }
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

    use super::super::finding::Status;
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn judged(said: &str) -> Finding {
        judge("firecracker".as_ref(), &Ok(said.to_owned()))
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
    fn an_old_firecracker_fails_and_none_is_warned_of() {
        assert_eq!(
            judged("Firecracker v1.12.1\n").parts(),
            (Status::Ok, "firecracker is 1.12.1", "")
        );
        assert_eq!(judged("Firecracker v1.6.9\n").status(), Status::Fail);
        assert_eq!(judged("Firecracker v1.7.0\n").status(), Status::Ok);
        let missing = probe("/no/such/firecracker".as_ref());
        assert_eq!(missing.status(), Status::Warn);
        assert_eq!(missing.parts().1, "/no/such/firecracker is not found");
        let denied = probe("/dev/null".as_ref());
        assert_eq!(denied.status(), Status::Warn);
        assert!(denied.parts().1.starts_with("/dev/null --version: Permission denied"));
    }

    #[test]
    fn nothing_that_a_stranger_says_is_repeated() {
        let finding = judged("\u{1b}]0;owned\u{7}Firecracker of doom\n");
        let (status, found, _) = finding.parts();
        assert_eq!(status, Status::Warn);
        assert_eq!(found, "firecracker --version does not answer like a Firecracker");
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
