//! One Firecracker process.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pagecast_client::fork::MemBackend;
use pagecast_client::http::{Answer, HttpError, Method, UnixHttp};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::exec;
use super::firecracker::Firecracker;
use super::jail::{Jail, JailedProcess, Jailer};
use pagecast_command::harmless;

/// Names in its folder.
pub(crate) const API_SOCKET: &str = "api.sock";
const LOG: &str = "log";
const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";

/// How long until we look again for its API.
const PACE: Duration = Duration::from_millis(2);
/// How long a process whose connection broke may take to be seen to have ended.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// How much of the end of its log is shown.
const TAIL_BYTES: u64 = 8192;
const TAIL_LINES: usize = 8;

/// A Firecracker in a folder of its own. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Vmm {
    process: Process,
    pid: i32,
    /// What it writes, and what that is.
    words: [(PathBuf, &'static str); 2],
    api: UnixHttp,
}

#[derive(Debug)]
enum Process {
    Child(Child),
    Jailed(JailedProcess),
}

/// Why a Firecracker is not what it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmmError {
    #[error("cannot make its folder {}", folder.display())]
    Folder {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start Firecracker")]
    Start(#[source] io::Error),
    #[error("the jailer failed ({status}){said}")]
    Jailer {
        status: ExitStatus,
        /// The last it said, a line each, indented.
        said: String,
    },
    #[error("the jailer has not started Firecracker within {0:?}")]
    JailerHangs(Duration),
    #[error("Firecracker's API is not there within {0:?}")]
    Silent(Duration),
    #[error("cannot look after Firecracker")]
    Wait(#[source] io::Error),
    #[error("cannot tell which files Firecracker has open for writing")]
    OpenFiles(#[source] io::Error),
    #[error("Firecracker has ended ({0})")]
    Ended(ExitStatus),
    #[error("{call} is not answered")]
    NoAnswer {
        call: String,
        #[source]
        source: HttpError,
    },
    #[error("Firecracker refuses {call}: {reason}{}", way_out(reason))]
    Refused { call: String, reason: String },
}

impl Vmm {
    /// Starts one in `folder`, which is made. Each answer of its API may take as long as `patience`.
    ///
    /// # Errors
    ///
    /// [`VmmError::Folder`] or [`VmmError::Start`].
    pub(crate) fn start(
        firecracker: &Firecracker,
        id: &str,
        folder: &Path,
        patience: Duration,
    ) -> Result<Self, VmmError> {
        let files = || {
            fs::create_dir(folder)?;
            // Firecracker wants its log to exist.
            File::create(folder.join(LOG))?;
            Ok((File::create(folder.join(STDOUT))?, File::create(folder.join(STDERR))?))
        };
        let (stdout, stderr) = files().map_err(|source| VmmError::Folder {
            folder: folder.to_owned(),
            source,
        })?;
        let mut command = exec::command(&firecracker.path);
        command
            .args(["--id", id, "--api-sock", API_SOCKET])
            .args(["--log-path", LOG, "--level", "Info"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        let child = Command::from(command)
            .kill_on_drop(true)
            .spawn()
            .map_err(VmmError::Start)?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        Ok(Self {
            pid: pid.expect("a pid is a positive i32, and known until somebody has waited for it"),
            api: UnixHttp::new(folder.join(API_SOCKET), patience),
            process: Process::Child(child),
            words: [
                (folder.join(LOG), "its log ends with"),
                (folder.join(STDERR), "its stderr ends with"),
            ],
        })
    }

    /// Has the jailer start one. Each answer of its API may take as long as `patience`, and so may the jailer.
    ///
    /// # Errors
    ///
    /// The jailer cannot be started, or fails.
    pub(crate) async fn start_in(jailer: &Jailer, jail: &Jail, patience: Duration) -> Result<Self, VmmError> {
        let mut command = jailer.command(jail).map_err(|source| VmmError::Folder {
            folder: jail.root(),
            source,
        })?;
        // Its log is what it prints: a file in the jail could be replaced by what is jailed.
        command.args(["--api-sock", API_SOCKET, "--level", "Info"]);
        let spawned = Command::from(command).kill_on_drop(true).spawn();
        let mut child = spawned.map_err(VmmError::Start)?;
        let ended = tokio::time::timeout(patience, child.wait()).await;
        let status = ended
            .map_err(|_| VmmError::JailerHangs(patience))?
            .map_err(VmmError::Wait)?;
        let words = [
            (jail.stdout(), "its log ends with"),
            (jail.stderr(), "its stderr ends with"),
        ];
        if !status.success() {
            let said = last_words(&words);
            return Err(VmmError::Jailer { status, said });
        }
        let process = jail.process().map_err(VmmError::Wait)?;
        Ok(Self {
            pid: process.pid(),
            api: UnixHttp::new(jail.root().join(API_SOCKET), patience),
            process: Process::Jailed(process),
            words,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until its API can be used.
    ///
    /// # Errors
    ///
    /// It has ended, or takes longer than `patience`.
    pub(crate) async fn listens(&mut self, patience: Duration) -> Result<(), VmmError> {
        let listening = async {
            // There is nothing to be woken by: a socket file appears some time before somebody listens there.
            while UnixStream::connect(self.api.socket()).await.is_err() {
                tokio::time::sleep(PACE).await;
            }
        };
        tokio::select! {
            listening = tokio::time::timeout(patience, listening) => listening.map_err(|_| VmmError::Silent(patience)),
            ended = self.process.wait() => Err(as_error(ended)),
        }
    }

    /// Loads a snapshot and leaves it paused; how long that took.
    ///
    /// # Errors
    ///
    /// It refuses, or has ended, or does not answer.
    pub(crate) async fn load(&mut self, vmstate: &Path, mem_backend: &MemBackend) -> Result<Duration, VmmError> {
        let body = json!({ "snapshot_path": vmstate, "mem_backend": mem_backend, "resume_vm": false });
        self.call(Method::PUT, "/snapshot/load", &body).await
    }

    /// Resumes the guest; how long that took.
    ///
    /// # Errors
    ///
    /// As of [`load`](Self::load).
    pub(crate) async fn resume(&mut self) -> Result<Duration, VmmError> {
        self.call(Method::PATCH, "/vm", &json!({ "state": "Resumed" })).await
    }

    async fn call(&mut self, method: Method, path: &str, body: &Value) -> Result<Duration, VmmError> {
        let call = format!("{method} {path}");
        let started = Instant::now();
        // Where it ends meanwhile the connection breaks, and there may have been an answer before that.
        let body = body.to_string().into_bytes();
        let answered = self.api.request(method, path, Some(body)).await;
        let took = started.elapsed();
        match answered {
            Ok(answer) if answer.status.is_success() => Ok(took),
            Ok(answer) => Err(VmmError::Refused {
                call,
                reason: reason(&answer),
            }),
            Err(source @ HttpError::TimedOut { .. }) => Err(VmmError::NoAnswer { call, source }),
            // Its connections break shortly before it can be waited for.
            Err(source) => match tokio::time::timeout(END_PATIENCE, self.process.wait()).await {
                Ok(ended) => Err(as_error(ended)),
                Err(_) => Err(VmmError::NoAnswer { call, source }),
            },
        }
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn ended(&mut self) -> VmmError {
        as_error(self.process.wait().await)
    }

    /// Kills it and waits for its end.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) async fn kill(&mut self) -> Result<(), VmmError> {
        self.process.kill().await.map_err(VmmError::Wait)
    }

    /// The last it said, a line each, indented; empty where it said nothing.
    pub(crate) fn last_words(&self) -> String {
        last_words(&self.words)
    }
}

impl Process {
    /// Waits for its end.
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        match self {
            Self::Child(child) => child.wait().await,
            Self::Jailed(process) => process.wait().await,
        }
    }

    /// Kills it and waits for its end.
    async fn kill(&mut self) -> io::Result<()> {
        match self {
            Self::Child(child) => child.kill().await,
            Self::Jailed(process) => process.kill().await,
        }
    }
}

fn last_words(files: &[(PathBuf, &'static str)]) -> String {
    let mut words = String::new();
    for (path, title) in files {
        let tail = tail(path).unwrap_or_default();
        if !tail.is_empty() {
            let _ = write!(words, "\n  {title}:\n    {}", tail.join("\n    "));
        }
    }
    words
}

/// What to do where Firecracker does not take the memory file of a guest with 2 MiB pages.
fn way_out(reason: &str) -> &'static str {
    if reason.contains("hugetlbfs") {
        "\n  the snapshot has 2 MiB pages, which takes `uffd`: remove the template and add it again with --page-size 2M, or run \
         with --backend uffd"
    } else {
        ""
    }
}

fn as_error(ended: io::Result<ExitStatus>) -> VmmError {
    ended.map_or_else(VmmError::Wait, VmmError::Ended)
}

/// Firecracker's own words, which it wraps as `{"fault_message": …}`.
fn reason(answer: &Answer) -> String {
    let wrapped = serde_json::from_slice::<Value>(&answer.body).ok();
    let message = wrapped.as_ref().and_then(|body| body.get("fault_message")?.as_str());
    harmless(message.unwrap_or(&String::from_utf8_lossy(&answer.body)))
}

/// The last lines of a file that may be long.
fn tail(path: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.len().saturating_sub(TAIL_LINES);
    Ok(lines.into_iter().skip(last).map(harmless).collect())
}

#[cfg(test)]
mod tests {
    use pagecast_client::http::StatusCode;

    use super::*;

    #[test]
    fn the_end_of_a_log_is_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let lines: Vec<_> = (0..2000).map(|number| format!("line {number}\n")).collect();
        fs::write(&path, lines.concat() + "\n\u{1b}[2Jlast\n").unwrap();
        let tail = tail(&path).unwrap();
        assert_eq!(tail.len(), TAIL_LINES);
        assert_eq!(tail.last().unwrap(), "\\u{1b}[2Jlast");
        assert_eq!(tail[TAIL_LINES - 2], "line 1999");
    }

    #[test]
    fn the_reason_of_a_refusal_is_firecrackers_own() {
        let answer = |body: &'static str| Answer {
            status: StatusCode::BAD_REQUEST,
            body: body.into(),
        };
        assert_eq!(reason(&answer(r#"{"fault_message":"no way"}"#)), "no way");
        assert_eq!(reason(&answer("oh no")), "oh no");
    }

    #[test]
    fn a_refusal_for_its_pages_says_what_to_do() {
        let refused = |reason: &str| VmmError::Refused {
            call: "PUT /snapshot/load".to_owned(),
            reason: reason.to_owned(),
        };
        let huge = "Cannot restore hugetlbfs backed snapshot by mapping the memory file. Please use uffd.";
        assert!(refused(huge).to_string().contains("--page-size 2M"));
        assert!(!refused("no way").to_string().contains("--page-size"));
    }
}
