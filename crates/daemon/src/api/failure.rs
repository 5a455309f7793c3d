//! Errors and their statuses.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use pagecast_client::error::ErrorBody;
use pagecast_client::{ApiError, ErrorCode};

/// An error as a response.
#[derive(Debug)]
pub(super) struct Failure(pub(super) ApiError);

impl Failure {
    pub(super) fn of(code: ErrorCode, message: impl std::fmt::Display) -> Self {
        Self(ApiError {
            code,
            message: message.to_string(),
        })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (status(self.0.code), Json(ErrorBody { error: self.0 })).into_response()
    }
}

/// The status for a code.
pub(super) fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest => StatusCode::BAD_REQUEST,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound | ErrorCode::TemplateNotFound | ErrorCode::ForkNotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::TemplateExists
        | ErrorCode::TemplateInUse
        | ErrorCode::TemplateChanged
        | ErrorCode::ForkExists
        | ErrorCode::ForkInUse
        | ErrorCode::ForkWaiting
        | ErrorCode::ForkEnded
        | ErrorCode::NotCompletable => StatusCode::CONFLICT,
        ErrorCode::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::InvalidField
        | ErrorCode::TemplateInvalid
        | ErrorCode::BackendUnavailable
        | ErrorCode::PathInvalid => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::TooManyForks => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::NotEnoughMemory | ErrorCode::Closing => StatusCode::SERVICE_UNAVAILABLE,
        // A new code needs its own line above.
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
