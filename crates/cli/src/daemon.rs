//! The daemon that commands speak to.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use pagecast_client::http::HttpError;
use pagecast_client::{Client, ClientError, ErrorCode};

/// Arguments that say which daemon to call.
#[derive(Args, Clone, Debug)]
pub(crate) struct DaemonArgs {
    /// Path of the daemon's control socket.
    #[arg(
        long,
        value_name = "PATH",
        env = "PAGECAST_SOCKET",
        default_value = "/run/pagecast/control.sock",
        global = true
    )]
    socket: PathBuf,
}

/// Errors of a call of the daemon.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// No process listens at the socket.
    #[error(
        "no daemon at {}: start it with `pagecast serve`, or name its socket with --socket",
        socket.display()
    )]
    NotRunning {
        socket: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// This user may not connect to the socket.
    #[error("the daemon at {} does not serve this user: run this command as the daemon's user or as root", socket.display())]
    NotAllowed {
        socket: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The call failed, or the answer is malformed.
    #[error(transparent)]
    NoAnswer(ClientError),
    /// The daemon ended during the command.
    #[error("the daemon has ended")]
    Ended,
    /// The daemon refused the call.
    #[error("{message} ({code})")]
    Refused { code: ErrorCode, message: String },
}

/// Exit codes of the commands that call the daemon, for their help.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage
  3  the daemon cannot be reached
  4  the daemon refused; the message ends with the error code";

const UNREACHABLE: u8 = 3;
const REFUSED: u8 = 4;

/// The exit code for an error of the daemon or of its connection. `None` for other errors.
pub(crate) fn exit_code(error: &anyhow::Error) -> Option<u8> {
    Some(match error.downcast_ref::<DaemonError>()? {
        DaemonError::Refused { .. } => REFUSED,
        _ => UNREACHABLE,
    })
}

impl DaemonArgs {
    /// Creates a client of this daemon.
    pub(crate) fn client(&self) -> Client {
        Client::new(&self.socket)
    }
}

impl DaemonError {
    /// Returns `true` if the daemon refused with this code.
    pub(crate) fn is(&self, wanted: ErrorCode) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == wanted)
    }
}

impl From<ClientError> for DaemonError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Api(error) => Self::Refused {
                code: error.code,
                message: error.message,
            },
            ClientError::Http(HttpError::Connect { socket, source }) => match source.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => Self::NotRunning { socket, source },
                ErrorKind::PermissionDenied => Self::NotAllowed { socket, source },
                _ => Self::NoAnswer(HttpError::Connect { socket, source }.into()),
            },
            error => Self::NoAnswer(error),
        }
    }
}

/// Runs a future to its end on this thread.
///
/// The thread matters: child processes of [`crate::run`] end with the thread that starts them.
///
/// # Errors
///
/// Those of the future; or the runtime cannot be created.
pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connecting_fails_with(kind: ErrorKind) -> anyhow::Error {
        let error = ClientError::from(HttpError::Connect {
            socket: "/run/s".into(),
            source: kind.into(),
        });
        DaemonError::from(error).into()
    }

    #[test]
    fn a_daemon_that_does_not_run_is_named_with_what_to_do() {
        let error = connecting_fails_with(ErrorKind::ConnectionRefused).context("cannot list");
        let said = format!("{error:#}");
        assert!(
            said.contains("start it with `pagecast serve`") || said.contains("Start it"),
            "{said}"
        );
        assert_eq!(exit_code(&error), Some(UNREACHABLE));
        let said = format!("{:#}", connecting_fails_with(ErrorKind::PermissionDenied));
        assert!(said.contains("as the daemon's user"), "{said}");
    }

    #[test]
    fn what_does_not_come_from_the_daemon_has_no_code_of_its_own() {
        assert_eq!(exit_code(&anyhow::anyhow!("cannot write to stdout")), None);
    }
}
