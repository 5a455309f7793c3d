//! What a request may say.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, Query, Request};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use pagecast_client::ErrorCode;
use serde::de::DeserializeOwned;

use super::failure::Failure;

/// The longest body, in bytes.
const MOST_BYTES: usize = 1 << 20;

/// How long a body may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A body of JSON, whatever the request calls it, as Firecracker takes it too.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let body = Limited::new(request.into_body(), MOST_BYTES).collect();
        let bytes = match tokio::time::timeout(PATIENCE, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                return Err(Failure::of(
                    ErrorCode::BodyTooLarge,
                    format_args!("the body is longer than {MOST_BYTES} bytes"),
                ));
            }
            Ok(Err(error)) => return Err(Failure::of(ErrorCode::BadRequest, format_args!("the body: {error}"))),
            Err(_) => {
                return Err(Failure::of(
                    ErrorCode::BadRequest,
                    format_args!("the body has not come within {PATIENCE:?}"),
                ));
            }
        };
        parse(&bytes).map(Self)
    }
}

fn parse<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Failure> {
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
            format_args!("the body goes on after its end: {error}"),
        )
    })?;
    Ok(value)
}

/// What the query says, or why that cannot be.
pub(super) fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Failure> {
    query
        .map(|Query(query)| query)
        .map_err(|rejection| Failure::of(ErrorCode::BadRequest, rejection.body_text()))
}
