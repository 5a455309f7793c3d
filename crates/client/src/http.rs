//! HTTP over a unix socket: one connection for each request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::Bytes;
pub use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// The longest answer that is read.
const MOST_BYTES: usize = 64 << 20;

/// A server at a unix socket, and how long it may take to answer.
#[derive(Clone, Debug)]
pub struct UnixHttp {
    socket: PathBuf,
    patience: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// Nobody listens there, or we may not speak to them.
    #[error("cannot connect to {}", socket.display())]
    Connect {
        /// Where.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The request cannot be sent, or what came back is no HTTP.
    #[error("cannot speak HTTP with {}", socket.display())]
    Http {
        /// With whom.
        socket: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer did not come, or not all of it.
    #[error("no answer from {} within {patience:?}", socket.display())]
    TimedOut {
        /// From whom.
        socket: PathBuf,
        /// How long we waited.
        patience: Duration,
    },
    /// The answer is too long to be one.
    #[error("the answer of {} is longer than {MOST_BYTES} bytes", socket.display())]
    TooLong {
        /// Whose.
        socket: PathBuf,
    },
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

impl UnixHttp {
    /// The server at `socket`, which may take as long as `patience` for each answer.
    pub fn new(socket: impl Into<PathBuf>, patience: Duration) -> Self {
        Self {
            socket: socket.into(),
            patience,
        }
    }

    /// Where it is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request, with `json` as its body where there is one, and waits for the answer, whatever its status.
    ///
    /// # Errors
    ///
    /// [`HttpError`] where there is no answer.
    pub async fn request(&self, method: Method, path: &str, json: Option<Vec<u8>>) -> Result<Answer, HttpError> {
        tokio::time::timeout(self.patience, self.exchange(method, path, json))
            .await
            .unwrap_or_else(|_| {
                Err(HttpError::TimedOut {
                    socket: self.socket.clone(),
                    patience: self.patience,
                })
            })
    }

    async fn exchange(&self, method: Method, path: &str, json: Option<Vec<u8>>) -> Result<Answer, HttpError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| HttpError::Connect {
                socket: self.socket.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.failed(error))?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("accept", "application/json");
        if json.is_some() {
            request = request.header("content-type", "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(json.unwrap_or_default())))
            .map_err(|error| self.failed(error))?;
        let answer = async {
            let (head, body) = sender
                .send_request(request)
                .await
                .map_err(|error| self.failed(error))?
                .into_parts();
            let body = Limited::new(body, MOST_BYTES).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    HttpError::TooLong {
                        socket: self.socket.clone(),
                    }
                } else {
                    self.failed(error)
                }
            })?;
            Ok(Answer {
                status: head.status,
                body: body.to_bytes(),
            })
        };
        // The connection does the reading and writing. Where it ends first, `answer` says why.
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            _ = connection => answer.await,
        }
    }

    fn failed(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> HttpError {
        HttpError::Http {
            socket: self.socket.clone(),
            source: source.into(),
        }
    }
}
