//! Connections, and the users who may make them.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::pin;
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

/// Most connections at once. Others wait.
const MOST_CONNECTIONS: usize = 256;

/// Most connections at once of users who may not use the socket. More are closed, so that they delay no other.
const MOST_FORBIDDEN: usize = 16;

/// Time that a client has to send the head of its first request, and of each later one.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// Time for which a connection takes new requests.
const CONNECTION_PATIENCE: Duration = Duration::from_mins(10);

/// Time after that for the last answer, so that a client that does not read it cannot hold the connection. Longer than
/// any call waits for the death of a VMM.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// Pause after a failed `accept`. Mostly the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens at `path`, and replaces a socket file of a dead daemon. No living daemon has it, since the run dir is
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

/// Serves the control API to the users that `may` accepts, until dropped. Others get `forbidden`.
pub(crate) async fn serve_control(
    listener: UnixListener,
    router: Router,
    forbidden: Router,
    mut may: impl FnMut(&UnixStream) -> bool,
) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let forbidden_places = Arc::new(Semaphore::new(MOST_FORBIDDEN));
    let mut connections = JoinSet::new();
    loop {
        let stream = accepted(listener.accept().await.map(|(stream, _)| stream)).await;
        while connections.try_join_next().is_some() {}
        let Some(stream) = stream else { continue };
        // Only connections of accepted users count, and only they are waited for.
        let (place, router) = if may(&stream) {
            (Arc::clone(&places).acquire_owned().await.ok(), &router)
        } else {
            (Arc::clone(&forbidden_places).try_acquire_owned().ok(), &forbidden)
        };
        let Some(place) = place else { continue };
        let router = router.clone();
        connections.spawn(async move {
            serve(stream, router, tokio::time::sleep(CONNECTION_PATIENCE), ANSWER_PATIENCE).await;
            drop(place);
        });
    }
}

/// Serves the metrics to every client, until dropped.
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
            serve(stream, router, tokio::time::sleep(CONNECTION_PATIENCE), ANSWER_PATIENCE).await;
            drop(place);
        });
    }
}

async fn accepted<S>(stream: io::Result<S>) -> Option<S> {
    match stream {
        Ok(stream) => Some(stream),
        Err(error) => {
            warn!(%error, "cannot accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

/// Returns `true` if the peer is the daemon's own user, root or an allowed one.
pub(crate) fn may_control(stream: &UnixStream, allowed: &[u32]) -> bool {
    let own = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) => peer.uid() == own || peer.uid() == 0 || allowed.contains(&peer.uid()),
        Err(_) => false,
    }
}

/// Serves a connection until its client or `until` ends it. After `until`, only the running call is answered, and has
/// `patience` for that.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    until: impl Future<Output = ()>,
    patience: Duration,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    tokio::select! {
        // Errors of the connection concern only its client.
        _ = connection.as_mut() => return,
        () = until => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(patience, connection).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    const ASK: &[u8] = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// Longer than any passing test takes.
    const PATIENCE: Duration = Duration::from_secs(40);

    /// A call that reports its start, and answers only on request.
    fn slow(begun: oneshot::Sender<()>, told: oneshot::Receiver<()>) -> Router {
        let signals = Arc::new(Mutex::new(Some((begun, told))));
        let call = async move || {
            let (begun, told) = signals.lock().unwrap().take().expect("it is called once");
            begun.send(()).unwrap();
            // Waits forever if there is no request.
            let _ = told.await;
            "done"
        };
        Router::new().route("/slow", get(call))
    }

    #[tokio::test]
    async fn a_call_under_way_at_the_end_of_a_connection_is_answered_and_no_other() {
        let (begun, has_begun) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        let (mut client, stream) = UnixStream::pair().unwrap();
        // The call cannot be over before its connection is.
        let until = async {
            has_begun.await.unwrap();
            tell.send(()).unwrap();
        };
        let served = serve(stream, slow(begun, told), until, PATIENCE);
        let asked = async {
            client.write_all(&ASK.repeat(2)).await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let ((), answer) = tokio::join!(served, asked);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        assert!(answer.ends_with("done"), "{answer:?}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer:?}");
    }

    #[tokio::test]
    async fn a_call_that_does_not_end_holds_its_connection_no_longer_than_the_patience() {
        let (begun, has_begun) = oneshot::channel();
        let (_tell, told) = oneshot::channel();
        let (mut client, stream) = UnixStream::pair().unwrap();
        let until = async { has_begun.await.unwrap() };
        client.write_all(ASK).await.unwrap();
        let served = serve(stream, slow(begun, told), until, Duration::from_millis(10));
        tokio::time::timeout(PATIENCE, served).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"");
    }

    /// These clients keep their connections for as long as they can.
    #[tokio::test]
    async fn those_who_may_not_keep_nobody_waiting_who_may() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = bind(&path, 0o600).unwrap();
        let router = Router::new().route("/slow", get(async || "done"));
        let never = Router::new().route("/slow", get(std::future::pending::<&str>));
        // All but the last.
        let mut left = MOST_CONNECTIONS + 1;
        let may = move |_: &UnixStream| {
            left -= 1;
            left == 0
        };
        let _serving = tokio::spawn(serve_control(listener, router, never, may));
        let mut crowd = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            // Some connections are closed.
            let _ = stream.write_all(ASK).await;
            crowd.push(stream);
        }
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(ASK).await.unwrap();
        let mut answer = [0; 12];
        let answered = tokio::time::timeout(PATIENCE, client.read_exact(&mut answer)).await;
        answered.expect("nobody may be kept waiting").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        // Beyond `MOST_FORBIDDEN`, their connections are closed.
        let last = crowd.last_mut().unwrap();
        let hung_up = tokio::time::timeout(PATIENCE, last.read(&mut [0])).await.unwrap();
        assert!(matches!(hung_up, Ok(0) | Err(_)), "{hung_up:?}");
    }
}
