//! Calls of the API that were answered, counted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;

use crate::service::Service;

/// Of requests that were answered, what they are counted by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Answered {
    pub(crate) method: &'static str,
    /// With the names of variables in place of their values; `other` for paths that there are none of, or that are not for
    /// this client.
    pub(crate) path: String,
    pub(crate) status: u16,
}

/// Requests that were answered.
#[derive(Default)]
pub(crate) struct Requests(Mutex<BTreeMap<Answered, u64>>);

impl Requests {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Answered, u64>> {
        // No code that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn counts(&self) -> BTreeMap<Answered, u64> {
        self.lock().clone()
    }
}

/// Counts a request once it is answered, whoever answers it.
pub(crate) async fn count(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let method = known_method(request.method());
    let path = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("other", MatchedPath::as_str)
        .to_owned();
    let response = next.run(request).await;
    let answered = Answered {
        method,
        path,
        status: response.status().as_u16(),
    };
    *service.requests().lock().entry(answered).or_default() += 1;
    response
}

/// The method, where it is one of a few: a client can make up any number of them.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}
