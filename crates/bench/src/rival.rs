//! Another page server, measured beside pagecast.

use std::convert::Infallible;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// Time that a server has to make its socket.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between two looks for it.
const PACE: Duration = Duration::from_millis(5);

const SOCKET: &str = "{socket}";
const MEM: &str = "{mem}";

/// The shell command of a page server, with `{socket}` and `{mem}` for the paths of its socket and of the mem-file.
#[derive(Clone, Debug)]
pub struct Rival {
    command: String,
}

impl FromStr for Rival {
    type Err = Infallible;

    fn from_str(command: &str) -> Result<Self, Infallible> {
        Ok(Self {
            command: command.to_owned(),
        })
    }
}

/// A running server, which is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct RivalServer {
    child: Child,
}

impl Rival {
    /// Starts a server for one VMM. Waits until it listens.
    pub(crate) fn start(&self, socket: &Path, mem: &Path) -> Result<RivalServer> {
        for name in [SOCKET, MEM] {
            ensure!(
                self.command.contains(name),
                "--rival: {name} is missing in `{}`",
                self.command
            );
        }
        let quoted = |path: &Path| format!("'{}'", path.display());
        let command = self.command.replace(SOCKET, &quoted(socket)).replace(MEM, &quoted(mem));
        let child = Command::new("sh")
            // The shell becomes the server, so that a signal reaches it.
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("failed to start `{command}`"))?;
        let mut server = RivalServer { child };
        let deadline = Instant::now() + PATIENCE;
        while !is_listened_at(socket)? {
            if let Some(status) = server.child.try_wait()? {
                bail!("`{command}` ended before its socket existed ({status})");
            }
            ensure!(
                Instant::now() < deadline,
                "`{command}` does not listen at {} after {PATIENCE:?}",
                socket.display()
            );
            std::thread::sleep(PACE);
        }
        Ok(server)
    }
}

/// Returns `true` if a process listens at this unix socket. A connection as a probe would use up a server for one VMM.
fn is_listened_at(socket: &Path) -> Result<bool> {
    /// `__SO_ACCEPTCON`, in the column "Flags".
    const LISTENS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").context("failed to read /proc/net/unix")?;
    let path = socket.to_str().context("the path of a socket is UTF-8")?;
    Ok(sockets.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some(LISTENS) && line.ends_with(path)
    }))
}

impl Drop for RivalServer {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
