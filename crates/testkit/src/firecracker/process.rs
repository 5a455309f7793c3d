//! The Firecracker process itself.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, getpid, pidfd_open, pidfd_send_signal, set_child_subreaper, waitid,
};
use tempfile::TempDir;

use super::{Jail, binary};

const LOG: &str = "log";
const STDERR: &str = "stderr";
const API_SOCKET: &str = "api.sock";
/// How many lines of Firecracker's log and of its standard error an error shows.
const TAIL_LINES: usize = 15;

/// A Firecracker in a temporary folder of its own, or in a jail. Dropping it kills it, and removes that afterwards.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// Set once it has been waited for.
    ended: Option<ExitStatus>,
    place: Place,
}

/// Where a Firecracker has its files.
#[derive(Debug)]
enum Place {
    Folder(TempDir),
    Jail(Jail),
}

/// Arguments of every Firecracker. The paths are relative to its folder, or to the root of its jail.
const ARGUMENTS: [&str; 6] = ["--level", "Info", "--log-path", LOG, "--api-sock", API_SOCKET];

impl Process {
    pub(crate) fn spawn() -> Result<(Self, ChildStdin, ChildStdout)> {
        let binary = binary()?;
        let folder = tempfile::Builder::new()
            .prefix("pagecast-vm-")
            .tempdir()
            .context("failed to create a folder for Firecracker")?;
        // Firecracker wants its log file to exist.
        File::create(folder.path().join(LOG)).context("failed to create Firecracker's log")?;
        let stderr = File::create(folder.path().join(STDERR)).context("failed to create Firecracker's stderr")?;
        let mut command = Command::new(&binary);
        command.current_dir(folder.path());
        let (child, input, output) = start(&mut command, stderr)?;
        Ok((Self::of(child.id(), Place::Folder(folder))?, input, output))
    }

    /// Starts one with the jailer.
    pub(crate) fn spawn_in(jail: Jail) -> Result<(Self, ChildStdin, ChildStdout)> {
        // The jailer ends once it has started Firecracker in its PID namespace, which becomes our child by this.
        set_child_subreaper(Some(getpid())).context("failed to become a subreaper")?;
        jail.create_file(LOG)?;
        let stderr = File::create(jail.root().join(STDERR)).context("failed to create Firecracker's stderr")?;
        let (mut child, input, output) = start(&mut jail.command()?, stderr)?;
        let status = child.wait().context("failed to wait for the jailer")?;
        let said = fs::read_to_string(jail.root().join(STDERR)).unwrap_or_default();
        ensure!(status.success(), "the jailer failed ({status}):\n{said}");
        let pid = jail.pid().with_context(|| said)?;
        Ok((Self::of(pid, Place::Jail(jail))?, input, output))
    }

    /// A child of this process that nobody has waited for.
    fn of(pid: u32, place: Place) -> Result<Self> {
        let raw = Pid::from_raw(pid.try_into()?).context("a pid is not 0")?;
        Ok(Self {
            pid,
            pidfd: pidfd_open(raw, PidfdFlags::empty()).context("failed to open a pidfd")?,
            ended: None,
            place,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn jail(&self) -> Option<&Jail> {
        match &self.place {
            Place::Jail(jail) => Some(jail),
            Place::Folder(_) => None,
        }
    }

    fn folder(&self) -> PathBuf {
        match &self.place {
            Place::Jail(jail) => jail.root(),
            Place::Folder(folder) => folder.path().to_owned(),
        }
    }

    /// The path that it knows what is at `path` by.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        self.jail().map_or_else(|| path.to_owned(), |jail| jail.inside(path))
    }

    /// Lets it read a file, which is copied if it is in a jail; the path that it knows the file by.
    pub(crate) fn take_in(&self, file: &Path) -> Result<PathBuf> {
        self.jail()
            .map_or_else(|| Ok(file.to_owned()), |jail| jail.take_in(file))
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.folder().join(API_SOCKET)
    }

    pub(crate) fn ensure_alive(&mut self) -> Result<()> {
        match self.reap(WaitIdOptions::NOHANG)? {
            None => Ok(()),
            Some(status) => bail!("Firecracker ended ({status})"),
        }
    }

    pub(crate) fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno).context("failed to kill Firecracker"),
        }
        self.reap(WaitIdOptions::empty())?.context("Firecracker has not ended")
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let timeout_spec = Timespec::try_from(timeout).context("timeout out of range")?;
        let ended =
            poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout_spec)).context("failed to poll")?;
        ensure!(ended > 0, "Firecracker still runs after {timeout:?}");
        self.reap(WaitIdOptions::empty())?.context("Firecracker has not ended")
    }

    /// How it has ended, if it has.
    fn reap(&mut self, options: WaitIdOptions) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            let id = WaitId::PidFd(self.pidfd.as_fd());
            let status = waitid(id, WaitIdOptions::EXITED | options).context("failed to look after Firecracker")?;
            self.ended = status.map(|status| {
                // As wait(2) tells it.
                let exited = status.exit_status().map(|code| code << 8);
                ExitStatus::from_raw(exited.or(status.terminating_signal()).unwrap_or_default())
            });
        }
        Ok(self.ended)
    }

    /// The error, and the last that Firecracker said.
    pub(crate) fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        let [log, stderr] = [LOG, STDERR].map(|name| {
            let text = fs::read(self.folder().join(name)).unwrap_or_default();
            tail(&String::from_utf8_lossy(&text))
        });
        anyhow!("{error:#}\nFirecracker's log ends with:\n{log}\nits standard error with:\n{stderr}")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It fails only for a process that has ended, which is what is wanted.
        let _ = self.kill();
    }
}

/// Starts Firecracker, or the jailer that is to start it.
fn start(command: &mut Command, stderr: File) -> Result<(Child, ChildStdin, ChildStdout)> {
    let mut child = command
        .args(ARGUMENTS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("failed to start {command:?}"))?;
    let pipes = child.stdin.take().zip(child.stdout.take());
    let (input, output) = pipes.expect("a child has the pipes it was given");
    Ok((child, input, output))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    match lines.get(lines.len().saturating_sub(TAIL_LINES)..) {
        None | Some([]) => "  (nothing)".to_owned(),
        Some(last) => last
            .iter()
            .map(|line| format!("  {line}"))
            .collect::<Vec<_>>()
            .join("\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_last_lines_in_their_order() {
        let text = (0..20).map(|line| format!("line {line}")).collect::<Vec<_>>().join(
            "
",
        );
        let tail = tail(&text);
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.starts_with("  line 5\n") && tail.ends_with("  line 19"), "{tail}");
    }

    #[test]
    fn an_empty_log_says_so() {
        assert_eq!(tail(""), "  (nothing)");
    }
}
