//! One Firecracker: its process, its API, and its output.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pagecast_client::fork::MemBackend;
use pagecast_client::http::{Answer, HttpError, Method, UnixHttp};
use pagecast_command::harmless;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::{Jail, Process, tail};

/// The socket of Firecracker's API, in its folder or in the root directory of its jail.
pub const API_SOCKET: &str = "api.sock";
const LOG: &str = "log";
const STDOUT: &str = "stdout";
const STDERR: &str = "stderr";

/// Time between two attempts to connect to the API.
const PACE: Duration = Duration::from_millis(2);
/// Time between a broken connection and the end of the process.
const END_PATIENCE: Duration = Duration::from_secs(1);

const LOG_TITLE: &str = "its log ends with";
const STDERR_TITLE: &str = "its stderr ends with";

/// The serial console of a guest: its input, and its output.
pub type Pipes = (ChildStdin, ChildStdout);

/// A Firecracker that is a child of this process. Dropping it kills it, without waiting for its end.
#[derive(Debug)]
pub struct Vmm {
    process: Process,
    pipes: Option<Pipes>,
    /// Files with its output, and a title for each.
    output: [(PathBuf, &'static str); 2],
    api: UnixHttp,
    /// Time that it has for each answer.
    patience: Duration,
}

/// The use of Firecracker's stdin and stdout, which are the serial console of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// The guest reads nothing. Its output goes to a file beside Firecracker's log.
    File,
    /// The caller gets them as pipes: [`Vmm::take_pipes`].
    Pipes,
}

/// Why a Firecracker cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// Its folder, or a file in it, cannot be created.
    #[error("cannot create its folder {}", folder.display())]
    Folder {
        /// Path of the folder.
        folder: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Firecracker, or the jailer, cannot be started.
    #[error("cannot start Firecracker")]
    Start(#[source] io::Error),
    /// The jailer failed.
    #[error("the jailer failed ({status}){said}")]
    Jailer {
        /// Its exit status.
        status: ExitStatus,
        /// The last lines of its output, indented.
        said: String,
    },
    /// The jailer did not end in time.
    #[error("the jailer has not started Firecracker within {0:?}")]
    JailerHangs(Duration),
    /// The API could not be reached in time.
    #[error("Firecracker's API socket does not accept connections within {0:?}")]
    Silent(Duration),
    /// The kernel cannot wait for Firecracker.
    #[error("cannot wait for Firecracker")]
    Wait(#[source] io::Error),
    /// Firecracker has ended.
    #[error("Firecracker has ended ({0})")]
    Ended(ExitStatus),
    /// A request has no answer, though Firecracker lives.
    #[error("{call} is not answered")]
    NoAnswer {
        /// Method and path of the request.
        call: String,
        /// The error of the connection.
        #[source]
        source: HttpError,
    },
    /// Firecracker refuses a request.
    #[error("Firecracker refuses {call}: {reason}")]
    Refused {
        /// Method and path of the request.
        call: String,
        /// The reason, in Firecracker's words.
        reason: String,
    },
}

impl Vmm {
    /// Starts a Firecracker by `command`, which names its program. It runs in `folder`, which is created if it is
    /// missing. `patience` is the time for each answer of its API.
    ///
    /// # Errors
    ///
    /// [`VmmError::Folder`] or [`VmmError::Start`].
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(
        mut command: Command,
        id: &str,
        folder: &Path,
        console: Console,
        patience: Duration,
    ) -> Result<Self, VmmError> {
        let mut files = || {
            fs::create_dir_all(folder)?;
            // Firecracker needs its log file to exist.
            File::create(folder.join(LOG))?;
            command.stderr(File::create(folder.join(STDERR))?);
            console.connect(&mut command, &folder.join(STDOUT))
        };
        files().map_err(|source| VmmError::Folder {
            folder: folder.to_owned(),
            source,
        })?;
        command
            .args(["--id", id, "--api-sock", API_SOCKET])
            .args(["--log-path", LOG, "--level", "Info"])
            .current_dir(folder);
        let (process, pipes) = spawn(command)?;
        Ok(Self {
            process,
            pipes,
            output: [(folder.join(LOG), LOG_TITLE), (folder.join(STDERR), STDERR_TITLE)],
            api: UnixHttp::new(folder.join(API_SOCKET), patience),
            patience,
        })
    }

    /// Starts a Firecracker in `jail` by `command`, which names the program of the jailer. `patience` is the time for
    /// the jailer, and for each answer of the API.
    ///
    /// # Errors
    ///
    /// The jailer cannot be started, or fails.
    pub async fn start_in(
        jail: &Jail,
        mut command: Command,
        console: Console,
        patience: Duration,
    ) -> Result<Self, VmmError> {
        jail.add_arguments(&mut command);
        command.args(["--api-sock", API_SOCKET, "--level", "Info"]);
        let mut files = || {
            command.stderr(File::create(jail.stderr())?);
            console.connect(&mut command, &jail.stdout())?;
            match console {
                // The log goes to stdout: the jailed process could replace a file in the jail.
                Console::File => Ok(jail.stdout()),
                Console::Pipes => {
                    command.args(["--log-path", LOG]);
                    jail.create_file(LOG)
                }
            }
        };
        let log = files().map_err(|source| VmmError::Folder {
            folder: jail.root(),
            source,
        })?;
        let output = [(log, LOG_TITLE), (jail.stderr(), STDERR_TITLE)];
        let (jailer, pipes) = spawn(command)?;
        let ended = tokio::time::timeout(patience, jailer.wait()).await;
        let status = ended
            .map_err(|_| VmmError::JailerHangs(patience))?
            .map_err(VmmError::Wait)?;
        if !status.success() {
            let said = tail::of_files(&output);
            return Err(VmmError::Jailer { status, said });
        }
        Ok(Self {
            process: jail.process().map_err(VmmError::Wait)?,
            pipes,
            output,
            api: UnixHttp::new(jail.root().join(API_SOCKET), patience),
            patience,
        })
    }

    /// Returns Firecracker's process ID in the PID namespace of the caller.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Takes the serial console of the guest. `None` without [`Console::Pipes`], and after the first call.
    pub fn take_pipes(&mut self) -> Option<Pipes> {
        self.pipes.take()
    }

    /// Waits until the API accepts connections.
    ///
    /// # Errors
    ///
    /// Firecracker has ended, or takes too long.
    pub async fn listens(&self) -> Result<(), VmmError> {
        let listening = async {
            // Polling, since no event says when the socket accepts connections. Its file appears earlier.
            while UnixStream::connect(self.api.socket()).await.is_err() {
                tokio::time::sleep(PACE).await;
            }
        };
        tokio::select! {
            listening = tokio::time::timeout(self.patience, listening) => {
                listening.map_err(|_| VmmError::Silent(self.patience))
            }
            ended = self.process.wait() => Err(as_error(ended)),
        }
    }

    /// Loads a snapshot, and resumes the guest if `resume` is set. Paths are those that Firecracker sees. Returns the
    /// time it took.
    ///
    /// # Errors
    ///
    /// Those of [`call`](Self::call).
    pub async fn load(&self, vmstate: &Path, mem_backend: &MemBackend, resume: bool) -> Result<Duration, VmmError> {
        let body = json!({ "snapshot_path": vmstate, "mem_backend": mem_backend, "resume_vm": resume });
        self.call(Method::PUT, "/snapshot/load", &body).await
    }

    /// Resumes the guest. Returns the time it took.
    ///
    /// # Errors
    ///
    /// Those of [`call`](Self::call).
    pub async fn resume(&self) -> Result<Duration, VmmError> {
        self.call(Method::PATCH, "/vm", &json!({ "state": "Resumed" })).await
    }

    /// Sends a request to the API. Returns the time until the answer.
    ///
    /// # Errors
    ///
    /// Firecracker refuses, has ended, or does not answer in time.
    pub async fn call(&self, method: Method, path: &str, body: &Value) -> Result<Duration, VmmError> {
        let call = format!("{method} {path}");
        let started = Instant::now();
        // If Firecracker ends meanwhile, the connection breaks. An answer may have come before.
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
            // The connection breaks shortly before the process can be waited for.
            Err(source) => match tokio::time::timeout(END_PATIENCE, self.process.wait()).await {
                Ok(ended) => Err(as_error(ended)),
                Err(_) => Err(VmmError::NoAnswer { call, source }),
            },
        }
    }

    /// Waits until Firecracker has ended by itself. Cancel safe.
    pub async fn ended(&self) -> VmmError {
        as_error(self.process.wait().await)
    }

    /// Kills Firecracker and waits for its end.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub async fn kill(&self) -> Result<ExitStatus, VmmError> {
        self.process.kill().await.map_err(VmmError::Wait)
    }

    /// Returns the last lines of Firecracker's output, indented. Empty if there are none.
    pub fn last_words(&self) -> String {
        tail::of_files(&self.output)
    }
}

impl Console {
    /// Sets stdin and stdout of `command`; `file` is the file for the guest's output.
    fn connect(self, command: &mut Command, file: &Path) -> io::Result<()> {
        match self {
            Self::File => command.stdin(Stdio::null()).stdout(File::create(file)?),
            Self::Pipes => command.stdin(Stdio::piped()).stdout(Stdio::piped()),
        };
        Ok(())
    }
}

/// Starts a child, and takes its pipes.
fn spawn(mut command: Command) -> Result<(Process, Option<Pipes>), VmmError> {
    let mut child = command.spawn().map_err(VmmError::Start)?;
    let pid = i32::try_from(child.id()).expect("a pid is a positive i32");
    let process = Process::open(pid).map_err(|source| {
        // A child without a pidfd would be lost.
        let _ = child.kill();
        VmmError::Start(source)
    })?;
    Ok((process, child.stdin.take().zip(child.stdout.take())))
}

fn as_error(ended: io::Result<ExitStatus>) -> VmmError {
    ended.map_or_else(VmmError::Wait, VmmError::Ended)
}

/// Firecracker's message, which is wrapped as `{"fault_message": …}`.
fn reason(answer: &Answer) -> String {
    let wrapped = serde_json::from_slice::<Value>(&answer.body).ok();
    let message = wrapped.as_ref().and_then(|body| body.get("fault_message")?.as_str());
    harmless(message.unwrap_or(&String::from_utf8_lossy(&answer.body)))
}

#[cfg(test)]
mod tests {
    use pagecast_client::http::StatusCode;

    use super::*;

    #[test]
    fn the_reason_of_a_refusal_is_firecrackers_own() {
        let answer = |body: &'static str| Answer {
            status: StatusCode::BAD_REQUEST,
            body: body.into(),
        };
        assert_eq!(reason(&answer(r#"{"fault_message":"no way"}"#)), "no way");
        assert_eq!(reason(&answer("oh no")), "oh no");
    }
}
