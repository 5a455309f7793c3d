//! Calls on the daemon itself.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use pagecast_client::Health;

use super::blocking;
use super::failure::Failure;
use crate::metrics;
use crate::requests::Requests;
use crate::service::Service;

/// Version, process and counts of the daemon
#[utoipa::path(get, path = "/v1/health", tag = "daemon", responses(
    (status = 200, body = Health, description = "the daemon is healthy"),
))]
pub(super) async fn health(State(service): State<Arc<Service>>) -> Result<Json<Health>, Failure> {
    blocking(move || Ok(Json(service.health()))).await
}

/// Metrics as Prometheus text
#[utoipa::path(get, path = "/metrics", tag = "daemon", responses(
    (status = 200, body = String, content_type = "text/plain; version=0.0.4", description = "the metrics"),
))]
pub(super) async fn metrics(
    State(service): State<Arc<Service>>,
    State(requests): State<Arc<Requests>>,
) -> Result<impl IntoResponse, Failure> {
    let text = blocking(move || Ok(metrics::text(&service, &requests))).await?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}
