//! What went wrong, as the API says it.

use std::error::Error;
use std::fmt::Display;

use pagecast::server::{Error as ServerError, chain};
use pagecast_client::{ApiError, ErrorCode};
use tracing::warn;

/// Creates an error of the API.
pub(super) fn refuse(code: ErrorCode, message: impl Display) -> ApiError {
    ApiError {
        code,
        message: message.to_string(),
    }
}

/// Logs what could not be done, and creates an error of the API for it.
pub(super) fn internal(what: &str, error: &dyn Error) -> ApiError {
    let error = chain(error);
    warn!(error, "cannot {what}");
    refuse(ErrorCode::Internal, format_args!("cannot {what}: {error}"))
}

/// What the page server says, as the API says it.
pub(super) fn server_refuses(error: &ServerError) -> ApiError {
    let code = match error {
        ServerError::ForkExists(_) => ErrorCode::ForkExists,
        ServerError::ForkInUse(_) => ErrorCode::ForkInUse,
        ServerError::ForkWaiting(_) => ErrorCode::ForkWaiting,
        ServerError::ForkEnded { .. } => ErrorCode::ForkEnded,
        ServerError::NotEnoughMemory { .. } => ErrorCode::NotEnoughMemory,
        ServerError::Template(error) if !error.may_pass() => ErrorCode::TemplateChanged,
        ServerError::SocketPath { .. } | ServerError::SocketInUse { .. } | ServerError::Socket { .. } => {
            ErrorCode::PathInvalid
        }
        ServerError::Closed => ErrorCode::Closing,
        _ => ErrorCode::Internal,
    };
    refuse(code, chain(error))
}

/// A few names, and how many more there are.
pub(super) fn abridged(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.get(..SHOWN.min(names.len())).unwrap_or_default().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
