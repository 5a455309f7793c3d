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

/// The query of the lists.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Measure {
    /// Measure the memory of the VMMs. Takes long for thousands.
    #[serde(default = "yes")]
    #[param(default = true)]
    pub(super) memory: bool,
}

fn yes() -> bool {
    true
}

/// All templates, sorted by name
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
/// The memory file must be a regular file of whole pages that no process has open for writing. It must not change while
/// it is a template.
#[utoipa::path(put, path = "/v1/templates/{name}", operation_id = "add_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")),
    request_body = AddTemplate, responses(
    (status = 201, body = Template, description = "added"),
    (status = 200, body = Template, description = "the same template exists"),
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
/// Undoes its protection.
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

/// Read a template into memory
///
/// Reads the working set into the page cache, which forks with `file` map. If no working set is known, reads all that
/// is not known to be zeros. Uses pages of 2 MiB if the file system has them. With `resident`, all that is not zeros is
/// locked in memory, by restarted daemons too. The last request holds. `warmth` shows the progress.
#[utoipa::path(post, path = "/v1/templates/{name}/warm", operation_id = "warm_template", tag = "templates",
    params(("name" = String, Path, description = "the name of the template")),
    request_body = Warm, responses(
    (status = 202, body = Template, description = "begun, or already done"),
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

/// Unlock a template
///
/// Also stops reading it. Its pages stay in the page cache until the kernel needs the memory.
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
