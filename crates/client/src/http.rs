//! HTTP over a unix socket: one connection for each request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::Bytes;
pub use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// The longest answer in bytes.
const MOST_BYTES: usize = 64 << 20;

/// A server at a unix socket, and the time it has for an answer.
#[derive(Clone, Debug)]
pub struct UnixHttp {
    socket: PathBuf,
    patience: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// No process listens there, or this user may not connect.
    #[error("cannot connect to {}", socket.display())]
    Connect {
        /// Path of the socket.
        socket: PathBuf,
        /// The error of the kernel.
        #[source]
        source: std::io::Error,
    },
    /// The request cannot be sent, or the answer is not HTTP.
    #[error("cannot speak HTTP with {}", socket.display())]
    Http {
        /// Path of the socket.
        socket: PathBuf,
        /// The error of the connection.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer did not come in time, or not all of it.
    #[error("no answer from {} within {patience:?}", socket.display())]
    TimedOut {
        /// Path of the socket.
        socket: PathBuf,
        /// The time that the server had.
        patience: Duration,
    },
    /// The answer is too long.
    #[error("the answer of {} is longer than {MOST_BYTES} bytes", socket.display())]
    TooLong {
        /// Path of the socket.
        socket: PathBuf,
    },
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The body.
    pub body: Bytes,
}

impl UnixHttp {
    /// The server at `socket`, which has `patience` for each answer.
    pub fn new(socket: impl Into<PathBuf>, patience: Duration) -> Self {
        Self {
            socket: socket.into(),
            patience,
        }
    }

    /// The path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request, with the body `json` if there is one, and returns the answer, whatever its status.
    ///
    /// # Errors
    ///
    /// [`HttpError`] if there is no answer.
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
        // The connection reads and writes. If it ends first, `answer` has the error.
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
