//! Errors of the API, with stable codes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The body of every answer that is an error: `{"error": {"code", "message"}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// The error.
    pub error: ApiError,
}

/// An error of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[error("{message}")]
pub struct ApiError {
    /// The kind of error, for programs.
    pub code: ErrorCode,
    /// The error and its remedy, for people.
    pub message: String,
}

/// A kind of error. Names never change; new ones may be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// 400: the body is not JSON, or the path or query cannot be read.
    BadRequest,
    /// 422: a field is unknown, missing, of the wrong type or out of range. The message names it.
    InvalidField,
    /// 413: the body is longer than 1 MiB.
    BodyTooLarge,
    /// 403: the caller's user may not use the control socket.
    Forbidden,
    /// 404: the path does not exist.
    NotFound,
    /// 405: the path does not have this method.
    MethodNotAllowed,
    /// 404: no template has this name.
    TemplateNotFound,
    /// 409: another template has this name.
    TemplateExists,
    /// 409: the template has living forks.
    TemplateInUse,
    /// 409: the template has changed since it was added.
    TemplateChanged,
    /// 422: the files cannot be used as a template.
    TemplateInvalid,
    /// 404: no fork has this id.
    ForkNotFound,
    /// 409: another fork has this id.
    ForkExists,
    /// 409: the fork's VMM is or may be alive, and is not complete.
    ForkInUse,
    /// 409: no VMM has connected to the fork.
    ForkWaiting,
    /// 409: the fork has ended.
    ForkEnded,
    /// 409: the fork cannot be completed: `file` forks have no pages to install.
    NotCompletable,
    /// 422: the requested backend cannot work here. The message gives the reason.
    BackendUnavailable,
    /// 422: a path is outside the allowed folders, taken, too long, or cannot be created.
    PathInvalid,
    /// 429: the configured number of forks is alive.
    TooManyForks,
    /// 503: the host has too little memory to complete the fork or to lock the template.
    NotEnoughMemory,
    /// 503: the daemon is stopping.
    Closing,
    /// 500: the daemon or its host failed.
    Internal,
    /// A code that this version does not know.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_written_as_it_is_sent() {
        assert_eq!(ErrorCode::TemplateInUse.to_string(), "template_in_use");
        let body = r#"{"error":{"code":"from_the_future","message":"?"}}"#;
        let body: ErrorBody = serde_json::from_str(body).unwrap();
        assert_eq!(body.error.code, ErrorCode::Unknown);
    }
}
