//! Calls on templates.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use pagecast_client::error::ErrorBody;
use pagecast_client::template::Warm;
use pagecast_client::{AddTemplate, Template};
use serde::Deserialize;

use super::blocking;
use super::body::{Body, Segment, query};
use super::failure::Failure;
use crate::service::Service;

/// Whether memory is measured.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Measure {
    /// Measure what the VMMs cost, which takes a while for very many.
    #[serde(default = "yes")]
    #[param(default = true)]
    pub(super) memory: bool,
}

fn yes() -> bool {
    true
}

/// All templates, by name
#[utoipa::path(get, path = "/v1/templates", operation_id = "list_templates", tag = "templates", params(Measure), responses(
    (status = 200, body = [Template], description = "the templates"),
    (status = 400, body = ErrorBody, description = "bad_request"),
))]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    measure: Result<Query<Measure>, QueryRejection>,
) -> Result<Json<Vec<Template>>, Failure> {
    let measure = query(measure)?;
    blocking(move || Ok(Json(service.show_templates(measure.memory)))).await
}

/// One template
#[utoipa::path(get, path = "/v1/templates/{name}", operation_id = "show_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")), responses(
    (status = 200, body = Template, description = "the template"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "template_not_found"),
))]
pub(super) async fn show(
    State(service): State<Arc<Service>>,
    Segment(name): Segment,
) -> Result<Json<Template>, Failure> {
    blocking(move || service.show_template(&name).map(Json)).await
}

/// Add a template
///
/// The memory file must be a regular file of whole pages that nobody has open for writing. It is held, guarded and must
/// not change for as long as it is a template.
#[utoipa::path(put, path = "/v1/templates/{name}", operation_id = "add_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")),
    request_body = AddTemplate, responses(
    (status = 201, body = Template, description = "added"),
    (status = 200, body = Template, description = "the same is there already"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 409, body = ErrorBody, description = "template_exists, template_changed"),
    (status = 413, body = ErrorBody, description = "body_too_large"),
    (status = 422, body = ErrorBody, description = "invalid_field, template_invalid"),
    (status = 503, body = ErrorBody, description = "closing"),
))]
pub(super) async fn add(
    State(service): State<Arc<Service>>,
    Segment(name): Segment,
    Body(template): Body<AddTemplate>,
) -> Result<(StatusCode, Json<Template>), Failure> {
    blocking(move || {
        let (template, is_new) = service.add_template(&name, template)?;
        let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
        Ok((status, Json(service.describe_template(&template, false))))
    })
    .await
}

/// Remove a template
///
/// Its protection is undone.
#[utoipa::path(delete, path = "/v1/templates/{name}", operation_id = "remove_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")), responses(
    (status = 204, description = "removed"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "template_not_found"),
    (status = 409, body = ErrorBody, description = "template_in_use"),
))]
pub(super) async fn remove(State(service): State<Arc<Service>>, Segment(name): Segment) -> Result<StatusCode, Failure> {
    blocking(move || service.remove_template(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Bring a template into memory
///
/// Into the page cache, which its forks with `file` map, in pages of 2 MiB where its file system has such: its working set,
/// else all that is not known to be zeros. Resident, all of that is locked there, and found again by the next daemon. What
/// was asked for last holds. `warmth` says how far it is.
#[utoipa::path(post, path = "/v1/templates/{name}/warm", operation_id = "warm_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")),
    request_body = Warm, responses(
    (status = 202, body = Template, description = "begun, or done already"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "template_not_found"),
    (status = 409, body = ErrorBody, description = "template_changed"),
    (status = 413, body = ErrorBody, description = "body_too_large"),
    (status = 422, body = ErrorBody, description = "invalid_field"),
    (status = 503, body = ErrorBody, description = "not_enough_memory, closing"),
))]
pub(super) async fn warm(
    State(service): State<Arc<Service>>,
    Segment(name): Segment,
    Body(warm): Body<Warm>,
) -> Result<(StatusCode, Json<Template>), Failure> {
    blocking(move || {
        let template = service.warm_template(&name, warm.resident)?;
        Ok((StatusCode::ACCEPTED, Json(service.describe_template(&template, false))))
    })
    .await
}

/// Keep a template in memory no longer
///
/// Stops bringing it there too. What is in the page cache stays until the kernel needs the memory.
#[utoipa::path(delete, path = "/v1/templates/{name}/warm", operation_id = "cool_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")), responses(
    (status = 204, description = "nothing of it is locked in memory"),
    (status = 400, body = ErrorBody, description = "bad_request"),
    (status = 404, body = ErrorBody, description = "template_not_found"),
))]
pub(super) async fn cool(State(service): State<Arc<Service>>, Segment(name): Segment) -> Result<StatusCode, Failure> {
    blocking(move || service.cool_template(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}
