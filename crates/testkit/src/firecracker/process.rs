//! The Firecracker process itself.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tempfile::TempDir;

use super::binary;

const LOG: &str = "log";
const STDERR: &str = "stderr";
const API_SOCKET: &str = "api.sock";
/// How many lines of Firecracker's log and of its standard error an error shows.
const TAIL_LINES: usize = 15;

/// A Firecracker in a temporary folder of its own. Dropping it kills it, and removes the folder after that.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    folder: TempDir,
}

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
        let mut child = Command::new(&binary)
            .current_dir(folder.path())
            .args(["--level", "Info", "--log-path", LOG, "--api-sock", API_SOCKET])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("failed to start {}", binary.display()))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.expect("a child has the pipes it was given");
        Ok((Self { child, folder }, input, output))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.folder.path().join(API_SOCKET)
    }

    pub(crate) fn ensure_alive(&mut self) -> Result<()> {
        match self.child.try_wait().context("failed to look after Firecracker")? {
            None => Ok(()),
            Some(status) => bail!("Firecracker ended ({status})"),
        }
    }

    pub(crate) fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().context("failed to kill Firecracker")?;
        self.child.wait().context("failed to reap Firecracker")
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        // Reaped already: there is no process to wait for, and its number may be another's.
        if let Some(status) = self.child.try_wait().context("failed to look after Firecracker")? {
            return Ok(status);
        }
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).context("failed to open a pidfd")?;
        let timeout_spec = Timespec::try_from(timeout).context("timeout out of range")?;
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout_spec)).context("failed to poll")?;
        ensure!(ended > 0, "Firecracker still runs after {timeout:?}");
        self.child.wait().context("failed to reap Firecracker")
    }

    /// The error, and the last that Firecracker said.
    pub(crate) fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        let [log, stderr] = [LOG, STDERR].map(|name| {
            let text = fs::read(self.folder.path().join(name)).unwrap_or_default();
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
