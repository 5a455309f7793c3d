//! Bodies, paths and queries of requests.

use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as _;
use pagecast_client::ErrorCode;
use serde::de::DeserializeOwned;

use super::failure::Failure;

/// The longest body in bytes.
const MOST_BYTES: usize = 1 << 20;

/// Time for a body to arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// A JSON body. As with Firecracker, the `Content-Type` does not matter.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let too_large = || {
            Failure::of(
                ErrorCode::BodyTooLarge,
                format_args!("the body is longer than {MOST_BYTES} bytes"),
            )
        };
        let body = request.into_body();
        // A client that announces a longer body need not send it.
        if body.size_hint().lower() > MOST_BYTES as u64 {
            return Err(too_large());
        }
        let body = Limited::new(body, MOST_BYTES).collect();
        let bytes = match tokio::time::timeout(PATIENCE, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
            Ok(Err(error)) => return Err(Failure::of(ErrorCode::BadRequest, format_args!("the body: {error}"))),
            Err(_) => {
                return Err(Failure::of(
                    ErrorCode::BadRequest,
                    format_args!("the body has not arrived within {PATIENCE:?}"),
                ));
            }
        };
        parse(&bytes).map(Self)
    }
}

/// Reads a whole body.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    // serde would take an array for the values of all fields, in the order of their declaration.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(Failure::of(
            ErrorCode::InvalidField,
            "the body is an array, but must be an object",
        ));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = error.path().to_string();
        let error = error.into_inner();
        match (error.classify(), &*field) {
            (serde_json::error::Category::Data, ".") => Failure::of(ErrorCode::InvalidField, error),
            (serde_json::error::Category::Data, field) => {
                Failure::of(ErrorCode::InvalidField, format_args!("{field}: {error}"))
            }
            _ => Failure::of(ErrorCode::BadRequest, format_args!("the body is not JSON: {error}")),
        }
    })?;
    json.end().map_err(|error| {
        Failure::of(
            ErrorCode::BadRequest,
            format_args!("the body has data after its end: {error}"),
        )
    })?;
    Ok(value)
}

/// The segment of a path that is a name, decoded.
pub(super) struct Segment(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(rejection) => Err(Failure::of(ErrorCode::BadRequest, rejection.body_text())),
        }
    }
}

/// The query, or the error if it cannot be read.
pub(super) fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Failure> {
    query
        .map(|Query(query)| query)
        .map_err(|rejection| Failure::of(ErrorCode::BadRequest, rejection.body_text()))
}
