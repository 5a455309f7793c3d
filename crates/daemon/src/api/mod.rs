//! The control API: HTTP and JSON around the service.
//!
//! | file | holds |
//! | --- | --- |
//! | `templates`, `forks`, `health` | the calls |
//! | `body` | bodies, paths and queries of requests |
//! | `count` | counts of answered calls |
//! | `failure` | errors and their statuses |
//! | `listen` | connections, and the users who may make them |

mod body;
mod count;
mod failure;
mod forks;
mod health;
pub(crate) mod listen;
mod templates;

use std::sync::Arc;

use axum::Router;
use axum::extract::FromRef;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use pagecast_client::{ApiError, ErrorCode};
use utoipa::OpenApi;
use utoipa::openapi::{Content, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::failure::Failure;
use crate::requests::Requests;
use crate::service::Service;

/// The state that all calls share.
#[derive(Clone)]
pub(crate) struct Api {
    /// Carries out the calls.
    pub(crate) service: Arc<Service>,
    /// Counts the answers.
    pub(crate) requests: Arc<Requests>,
}

impl FromRef<Api> for Arc<Service> {
    fn from_ref(api: &Api) -> Self {
        Arc::clone(&api.service)
    }
}

impl FromRef<Api> for Arc<Requests> {
    fn from_ref(api: &Api) -> Self {
        Arc::clone(&api.requests)
    }
}

/// The general part of the `OpenAPI` document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "pagecast control API",
        description = "One paused Firecracker microVM (a template), many live copies (forks). Served over a unix socket, \
                       by default at /run/pagecast/control.sock. Every error is {\"error\": {\"code\", \"message\"}} with a \
                       code that does not change.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
        contact(),
    ),
    servers((url = "http://localhost", description = "A unix socket, so the host name is arbitrary")),
    tags(
        (name = "templates", description = "Memory images of paused microVMs"),
        (name = "forks", description = "MicroVMs restored from a template"),
        (name = "daemon", description = "The daemon itself"),
    )
)]
struct Document;

fn described() -> (Router<Api>, utoipa::openapi::OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(templates::list))
        .routes(routes!(templates::show, templates::add, templates::remove))
        .routes(routes!(templates::warm, templates::cool))
        .routes(routes!(forks::list, forks::create))
        .routes(routes!(forks::show, forks::remove))
        .routes(routes!(forks::complete))
        .routes(routes!(health::health))
        .routes(routes!(health::metrics))
        .split_for_parts();
    add_common_errors(&mut document);
    (router, document)
}

/// Adds the errors that every call can return.
fn add_common_errors(document: &mut utoipa::openapi::OpenApi) {
    let body = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    for path in document.paths.paths.values_mut() {
        let calls = [&mut path.get, &mut path.put, &mut path.post, &mut path.delete];
        for call in calls.into_iter().flatten() {
            for (status, code) in OF_EVERY_CALL {
                let error = ResponseBuilder::new()
                    .description(code)
                    .content("application/json", body.clone());
                call.responses.responses.insert(status.to_owned(), error.build().into());
            }
        }
    }
}

/// Errors that every call can return: their status and code.
const OF_EVERY_CALL: [(&str, &str); 2] = [("403", "forbidden"), ("500", "internal")];

/// Creates the router with all calls.
pub(crate) fn router(api: Api) -> Router {
    let (router, _) = described();
    let counted = from_fn_with_state(api.clone(), count::count);
    router
        .method_not_allowed_fallback(async || Failure::of(ErrorCode::MethodNotAllowed, "this path has no such method"))
        .fallback(async || {
            Failure::of(
                ErrorCode::NotFound,
                "this path does not exist; see the OpenAPI document",
            )
        })
        .layer(counted)
        .with_state(api)
}

/// Creates the router with the metrics alone, for clients that may not use the control API.
pub(crate) fn metrics_router(api: Api) -> Router {
    let counted = from_fn_with_state(api.clone(), count::count);
    Router::new()
        .route("/metrics", get(health::metrics))
        .fallback(async || Failure::of(ErrorCode::NotFound, "only /metrics is here"))
        .layer(counted)
        .with_state(api)
}

/// Creates the router for users who may not use the control socket: every call is refused.
pub(crate) fn forbidden_router(api: Api) -> Router {
    let counted = from_fn_with_state(api, count::count);
    Router::new()
        .fallback(async || {
            Failure::of(
                ErrorCode::Forbidden,
                "your user may not use this socket; see allowed_uids in the daemon's configuration",
            )
        })
        .layer(counted)
}

/// Returns the `OpenAPI` document as JSON, generated from the code.
pub fn openapi() -> String {
    let (_, document) = described();
    // Strings and maps can always be serialized.
    let mut json = document.to_pretty_json().expect("a document that is plain data");
    json.push('\n');
    json
}

/// Runs work that may wait for disks and processes, on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Failure),
        Err(panic) => {
            tracing::error!(%panic, "a call has failed");
            Err(Failure::of(
                ErrorCode::Internal,
                "the call has failed; the log has details",
            ))
        }
    }
}

/// For `pagecast-fuzz`: reads the body of a request, as the calls do. An error has the status of its answer.
#[cfg(feature = "fuzzing")]
pub(crate) fn body<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, (u16, ApiError)> {
    body::parse(bytes).map_err(|failure| (failure::status(failure.0.code).as_u16(), failure.0))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_call_is_described_under_a_name_of_its_own_with_what_can_go_wrong() {
        let (_, document) = described();
        let mut names = BTreeSet::new();
        for (path, item) in &document.paths.paths {
            let calls = [&item.get, &item.put, &item.post, &item.delete];
            for call in calls.into_iter().flatten() {
                let name = call.operation_id.clone().unwrap_or_default();
                assert!(
                    names.insert(name.clone()),
                    "{path}: {name:?} is the name of another call"
                );
                for status in ["403", "500"] {
                    assert!(call.responses.responses.contains_key(status), "{name}: {status}");
                }
                for (status, response) in &call.responses.responses {
                    let utoipa::openapi::RefOr::T(response) = response else {
                        continue;
                    };
                    assert!(!response.description.is_empty(), "{name}: {status}");
                }
            }
        }
        assert_eq!(names.len(), 13, "{names:?}");
    }
}
