//! Calls on templates.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use pagecast_client::error::ErrorBody;
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
