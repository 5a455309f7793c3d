//! Connections, and who may have one.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::warn;

/// How many connections there can be at once; more wait their turn.
const MOST_CONNECTIONS: usize = 256;

/// How long a client may take to send the head of a request, the first or the next.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may live: somebody who does not read its answers does not hold it for ever.
const CONNECTION_PATIENCE: Duration = Duration::from_mins(10);

/// After a failed `accept`, which mostly means that there are no file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens at `path`, in place of a socket that a dead daemon has left there. Nobody else can be alive: the run dir is
/// locked.
pub(crate) fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Serves the control API to those who may use it, until dropped; others get `forbidden`.
pub(crate) async fn serve_control(listener: UnixListener, router: Router, forbidden: Router, allowed: Vec<u32>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        let stream = accepted(listener.accept().await.map(|(stream, _)| stream)).await;
        while connections.try_join_next().is_some() {}
        let Some(stream) = stream else { continue };
        let router = if may_control(&stream, &allowed) {
            router.clone()
        } else {
            forbidden.clone()
        };
        connections.spawn(async move {
            serve(stream, router).await;
            drop(place);
        });
    }
}

/// Serves the metrics to everybody, until dropped.
pub(crate) async fn serve_metrics(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        let stream = accepted(listener.accept().await.map(|(stream, _)| stream)).await;
        while connections.try_join_next().is_some() {}
        let Some(stream) = stream else { continue };
        let router = router.clone();
        connections.spawn(async move {
            serve(stream, router).await;
            drop(place);
        });
    }
}

async fn accepted<S>(stream: io::Result<S>) -> Option<S> {
    match stream {
        Ok(stream) => Some(stream),
        Err(error) => {
            warn!(%error, "cannot take a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

fn may_control(stream: &UnixStream, allowed: &[u32]) -> bool {
    let own = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) => peer.uid() == own || peer.uid() == 0 || allowed.contains(&peer.uid()),
        Err(_) => false,
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // How it ends is the client's affair.
    let _ = tokio::time::timeout(CONNECTION_PATIENCE, connection).await;
}
