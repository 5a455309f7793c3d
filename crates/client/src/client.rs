//! The client.

use std::path::Path;
use std::time::Duration;

use hyper::Method;
use percent_encoding::{NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ApiError, ErrorBody};
use crate::fork::{CreateFork, CreatedFork, Fork};
use crate::health::Health;
use crate::http::{Answer, HttpError, UnixHttp};
use crate::template::{AddTemplate, Template, Warm};

/// Time that the daemon may take to answer. Measuring the memory of thousands of forks takes longest.
const PATIENCE: Duration = Duration::from_mins(1);

/// A client of the daemon at a control socket.
#[derive(Clone, Debug)]
pub struct Client {
    http: UnixHttp,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is no answer.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The daemon refused the call.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The answer is not one of this API.
    #[error("{} does not answer as pagecast does (status {status}): {what}", socket.display())]
    Answer {
        /// The control socket.
        socket: std::path::PathBuf,
        /// The status of the answer.
        status: u16,
        /// The flaw of the answer.
        what: String,
    },
}

impl Client {
    /// Creates a client of the daemon whose control socket is at `socket`.
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            http: UnixHttp::new(socket.as_ref(), PATIENCE),
        }
    }

    /// The path of the control socket.
    pub fn socket(&self) -> &Path {
        self.http.socket()
    }

    /// Returns version, process and counts of the daemon.
    ///
    /// # Errors
    ///
    /// [`ClientError`], as for all calls.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get("/v1/health").await
    }

    /// Returns the metrics as Prometheus text.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let answer = self.call(Method::GET, "/metrics", None::<&()>).await?;
        Ok(String::from_utf8_lossy(&answer.body).into_owned())
    }

    /// Adds a template. Succeeds if the same template exists.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn add_template(&self, name: &str, template: &AddTemplate) -> Result<Template, ClientError> {
        self.read(&self.call(Method::PUT, &template_path(name), Some(template)).await?)
    }

    /// Returns all templates, sorted by name.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn templates(&self) -> Result<Vec<Template>, ClientError> {
        self.get("/v1/templates").await
    }

    /// Returns one template.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn template(&self, name: &str) -> Result<Template, ClientError> {
        self.get(&template_path(name)).await
    }

    /// Removes a template and undoes its protection.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn remove_template(&self, name: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, &template_path(name), None::<&()>).await?;
        Ok(())
    }

    /// Begins to read a template into memory. Its [`warmth`](Template::warmth) shows the progress.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn warm_template(&self, name: &str, warm: Warm) -> Result<Template, ClientError> {
        let path = format!("{}/warm", template_path(name));
        self.read(&self.call(Method::POST, &path, Some(&warm)).await?)
    }

    /// Stops reading a template into memory, and unlocks it.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn cool_template(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("{}/warm", template_path(name));
        self.call(Method::DELETE, &path, None::<&()>).await?;
        Ok(())
    }

    /// Creates a fork. The answer has the `mem_backend` for Firecracker.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn create_fork(&self, fork: &CreateFork) -> Result<CreatedFork, ClientError> {
        self.read(&self.call(Method::POST, "/v1/forks", Some(fork)).await?)
    }

    /// Returns all forks, sorted by ID. With `memory`, the memory of each is measured, which takes long for thousands.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn forks(&self, memory: bool) -> Result<Vec<Fork>, ClientError> {
        self.get(&format!("/v1/forks?memory={memory}")).await
    }

    /// Returns one fork.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn fork(&self, id: &str) -> Result<Fork, ClientError> {
        self.get(&fork_path(id)).await
    }

    /// Begins to complete a fork. Its state shows when that is done.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn complete_fork(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("{}/complete", fork_path(id));
        self.call(Method::POST, &path, None::<&()>).await?;
        Ok(())
    }

    /// Deletes a fork. With `kill`, its VMM is killed first.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn remove_fork(&self, id: &str, kill: bool) -> Result<(), ClientError> {
        let path = format!("{}?kill={kill}", fork_path(id));
        self.call(Method::DELETE, &path, None::<&()>).await?;
        Ok(())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.read(&self.call(Method::GET, path, None::<&()>).await?)
    }

    /// Sends a request. An error answer becomes an error.
    async fn call(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Answer, ClientError> {
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(|error| HttpError::Http {
            socket: self.socket().to_owned(),
            source: error.into(),
        })?;
        let answer = self.http.request(method, path, body).await?;
        if answer.status.is_success() {
            return Ok(answer);
        }
        let body: ErrorBody = self.read(&answer)?;
        Err(body.error.into())
    }

    fn read<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, ClientError> {
        serde_json::from_slice(&answer.body).map_err(|error| ClientError::Answer {
            socket: self.socket().to_owned(),
            status: answer.status.as_u16(),
            what: error.to_string(),
        })
    }
}

fn template_path(name: &str) -> String {
    format!("/v1/templates/{}", segment(name))
}

fn fork_path(id: &str) -> String {
    format!("/v1/forks/{}", segment(id))
}

/// Encodes a name as one segment of a path, so that no name can change the path.
fn segment(name: &str) -> PercentEncode<'_> {
    utf8_percent_encode(name, NON_ALPHANUMERIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_segment() {
        assert_eq!(template_path("a/../b?c"), "/v1/templates/a%2F%2E%2E%2Fb%3Fc");
        assert_eq!(fork_path("fork-1"), "/v1/forks/fork%2D1");
    }
}
