//! Calls on forks.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use pagecast_client::error::ErrorBody;
use pagecast_client::{CreateFork, CreatedFork, Fork};
use serde::Deserialize;

use super::blocking;
use super::body::{Body, Segment, query};
use super::failure::Failure;
use super::templates::Measure;
use crate::service::Service;

/// The query of `DELETE /v1/forks/{id}`.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Kill {
    /// Kill the VMM first, and wait for its end.
    #[serde(default)]
    kill: bool,
}

/// All forks, sorted by ID
#[utoipa::path(get, path = "/v1/forks", operation_id = "list_forks", tag = "forks", params(Measure), responses(
    (status = 200, body = [Fork], description = "the forks"),
    (status = 400, body = ErrorBody, description = "bad_request"),
))]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    measure: Result<Query<Measure>, QueryRejection>,
) -> Result<Json<Vec<Fork>>, Failure> {
    let measure = query(measure)?;
    blocking(move || Ok(Json(service.show_forks(measure.memory)))).await
}

/// Create a fork
///
/// The answer has the `mem_backend` for Firecracker's `PUT /snapshot/load`.
#[utoipa::path(post, path = "/v1/forks", operation_id = "create_fork", tag = "forks", request_body = CreateFork, responses(
    (status = 201, body = CreatedFork, description = "made"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "template_not_found"),
    (status = 409, body = ErrorBody, description = "fork_exists, template_changed"),
    (status = 413, body = ErrorBody, description = "body_too_large"),
    (status = 422, body = ErrorBody, description = "invalid_field, backend_unavailable, path_invalid"),
    (status = 429, body = ErrorBody, description = "too_many_forks"),
    (status = 503, body = ErrorBody, description = "closing"),
))]
pub(super) async fn create(
    State(service): State<Arc<Service>>,
    Body(wanted): Body<CreateFork>,
) -> Result<(StatusCode, Json<CreatedFork>), Failure> {
    blocking(move || {
        let fork = service.create_fork(&wanted)?;
        Ok((StatusCode::CREATED, Json(fork.created())))
    })
    .await
}

/// One fork
#[utoipa::path(get, path = "/v1/forks/{id}", operation_id = "show_fork", tag = "forks",
    params(("id" = String, Path, description = "the id of the fork")), responses(
    (status = 200, body = Fork, description = "the fork"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "fork_not_found"),
))]
pub(super) async fn show(State(service): State<Arc<Service>>, Segment(id): Segment) -> Result<Json<Fork>, Failure> {
    blocking(move || service.show_fork(&id).map(Json)).await
}

/// Complete a fork
///
/// Installs the rest of its memory and unregisters it. Its VMM no longer needs the daemon once the state is `complete`.
#[utoipa::path(post, path = "/v1/forks/{id}/complete", operation_id = "complete_fork", tag = "forks",
    params(("id" = String, Path, description = "the id of the fork")), responses(
    (status = 202, description = "begun, or already complete"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "fork_not_found"),
    (status = 409, body = ErrorBody, description = "fork_waiting, fork_ended, not_completable"),
    (status = 503, body = ErrorBody, description = "not_enough_memory"),
))]
pub(super) async fn complete(State(service): State<Arc<Service>>, Segment(id): Segment) -> Result<StatusCode, Failure> {
    blocking(move || service.complete_fork(&id)).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Delete a fork
///
/// Refused if its VMM lives and needs the daemon, unless `kill` is set.
#[utoipa::path(delete, path = "/v1/forks/{id}", operation_id = "delete_fork", tag = "forks",
    params(("id" = String, Path, description = "the id of the fork"), Kill), responses(
    (status = 204, description = "deleted"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "fork_not_found"),
    (status = 409, body = ErrorBody, description = "fork_in_use"),
))]
pub(super) async fn remove(
    State(service): State<Arc<Service>>,
    Segment(id): Segment,
    kill: Result<Query<Kill>, QueryRejection>,
) -> Result<StatusCode, Failure> {
    let kill = query(kill)?.kill;
    blocking(move || service.remove_fork(&id, kill)).await?;
    Ok(StatusCode::NO_CONTENT)
}
