//! Errors of the API.

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

/// Logs a failed operation, and creates an error of the API for it.
pub(super) fn internal(what: &str, error: &dyn Error) -> ApiError {
    let error = chain(error);
    warn!(error, "cannot {what}");
    refuse(ErrorCode::Internal, format_args!("cannot {what}: {error}"))
}

/// Converts an error of the page server to one of the API.
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

/// Returns the first few names, and the number of the others.
pub(super) fn abridged(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.get(..SHOWN.min(names.len())).unwrap_or_default().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
