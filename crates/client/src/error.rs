//! What goes wrong, with codes that do not change.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The body of every answer that is an error: `{"error": {"code", "message"}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ApiError,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[error("{message}")]
pub struct ApiError {
    /// For machines.
    pub code: ErrorCode,
    /// For people: what, and what to do about it.
    pub message: String,
}

/// A kind of error. The names never change; new ones may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// 400: the body is not JSON, or the path or query cannot be read.
    BadRequest,
    /// 422: a field is unknown, missing, of the wrong type or has an impossible value. The message names it.
    InvalidField,
    /// 413: the body is longer than 1 MiB.
    BodyTooLarge,
    /// 403: the caller runs as a user that may not use the control socket.
    Forbidden,
    /// 404: there is no such call.
    NotFound,
    /// 405: the call exists, but not with this method.
    MethodNotAllowed,
    /// 404: no template has this name.
    TemplateNotFound,
    /// 409: another template has this name.
    TemplateExists,
    /// 409: forks of the template live.
    TemplateInUse,
    /// 409: the template is not what it was when it was added.
    TemplateChanged,
    /// 422: the files cannot be a template.
    TemplateInvalid,
    /// 404: no fork has this id.
    ForkNotFound,
    /// 409: another fork has this id.
    ForkExists,
    /// 409: the fork's VMM lives, or may live, and has not been completed.
    ForkInUse,
    /// 409: no VMM has connected to the fork.
    ForkWaiting,
    /// 409: the fork has ended.
    ForkEnded,
    /// 409: the fork is not one that can be completed: with `file` there is nothing to install.
    NotCompletable,
    /// 422: the backend that was asked for cannot work here. The message says why.
    BackendUnavailable,
    /// 422: a path is outside of what is allowed, taken, too long, or cannot be made.
    PathInvalid,
    /// 429: as many forks live as the configuration allows.
    TooManyForks,
    /// 503: completing a fork, or keeping a template in memory, would drive the host out of memory.
    NotEnoughMemory,
    /// 503: the daemon is stopping.
    Closing,
    /// 500: a failure of the daemon or its host.
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
