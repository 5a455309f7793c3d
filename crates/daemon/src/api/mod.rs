//! The control API: HTTP and JSON around the service.
//!
//! | file | holds |
//! | --- | --- |
//! | `templates`, `forks`, `health` | the calls |
//! | `body` | what a request may say |
//! | `failure` | errors and their statuses |
//! | `listen` | connections, and who may have one |

mod body;
mod failure;
mod forks;
mod health;
pub(crate) mod listen;
mod templates;

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use pagecast_client::{ApiError, ErrorCode};
use utoipa::OpenApi;
use utoipa::openapi::{Content, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::failure::Failure;
use crate::metrics::requests;
use crate::service::Service;

/// What the `OpenAPI` document says of the whole.
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
    tags(
        (name = "templates", description = "Memory images of paused microVMs"),
        (name = "forks", description = "MicroVMs restored from a template"),
        (name = "daemon", description = "The daemon itself"),
    )
)]
struct Document;

fn described() -> (Router<Arc<Service>>, utoipa::openapi::OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(templates::list))
        .routes(routes!(templates::show, templates::add, templates::remove))
        .routes(routes!(forks::list, forks::create))
        .routes(routes!(forks::show, forks::remove))
        .routes(routes!(forks::complete))
        .routes(routes!(health::health))
        .routes(routes!(health::metrics))
        .split_for_parts();
    for path in document.paths.paths.values_mut() {
        let calls = [&mut path.get, &mut path.put, &mut path.post, &mut path.delete];
        for call in calls.into_iter().flatten() {
            for (status, code) in OF_EVERY_CALL {
                let error = Content::new(Some(Ref::from_schema_name("ErrorBody")));
                let response = ResponseBuilder::new()
                    .description(code)
                    .content("application/json", error);
                call.responses
                    .responses
                    .insert(status.to_owned(), response.build().into());
            }
        }
    }
    (router, document)
}

/// Errors that any call can answer with: their status and code.
const OF_EVERY_CALL: [(&str, &str); 2] = [("403", "forbidden"), ("500", "internal")];

/// All calls.
pub(crate) fn router(service: Arc<Service>) -> Router {
    let (router, _) = described();
    let counted = from_fn_with_state(Arc::clone(&service), requests::count);
    router
        .method_not_allowed_fallback(async || Failure::of(ErrorCode::MethodNotAllowed, "this path has no such method"))
        .fallback(async || Failure::of(ErrorCode::NotFound, "there is no such path; see the OpenAPI document"))
        .layer(counted)
        .with_state(service)
}

/// The metrics alone, for whoever may not control anything.
pub(crate) fn metrics_router(service: Arc<Service>) -> Router {
    let counted = from_fn_with_state(Arc::clone(&service), requests::count);
    Router::new()
        .route("/metrics", get(health::metrics))
        .fallback(async || Failure::of(ErrorCode::NotFound, "only /metrics is here"))
        .layer(counted)
        .with_state(service)
}

/// What those get who may not use the control socket.
pub(crate) fn forbidden_router(service: Arc<Service>) -> Router {
    let counted = from_fn_with_state(service, requests::count);
    Router::new()
        .fallback(async || {
            Failure::of(
                ErrorCode::Forbidden,
                "your user may not use this socket; see allowed_uids in the daemon's configuration",
            )
        })
        .layer(counted)
}

/// The `OpenAPI` document, generated from the code, as JSON.
pub fn openapi() -> String {
    let (_, document) = described();
    // Made of strings and maps only.
    let mut json = document.to_pretty_json().expect("a document that is plain data");
    json.push('\n');
    json
}

/// Does something that may wait for disks and processes, on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Failure),
        Err(panic) => {
            tracing::error!(%panic, "a call has failed");
            Err(Failure::of(
                ErrorCode::Internal,
                "the call has failed; the log says more",
            ))
        }
    }
}
