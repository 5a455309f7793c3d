//! Connections, and who may have one.

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

/// How many connections there can be at once; more wait their turn.
const MOST_CONNECTIONS: usize = 256;

/// How many there can be at once of those who may not use the socket; more are hung up on, so that they keep nobody waiting.
const MOST_FORBIDDEN: usize = 16;

/// How long a client may take to send the head of a request, the first or the next.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may take new requests.
const CONNECTION_PATIENCE: Duration = Duration::from_mins(10);

/// How long after that the last of them may take to be answered: somebody who does not read its answers does not hold the
/// connection for ever. Longer than any call waits for a VMM to die.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

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

/// Serves the control API to those who `may` use it, until dropped; others get `forbidden`.
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
        // Only those who may take a place of those who may, and only they are waited for.
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
            serve(stream, router, tokio::time::sleep(CONNECTION_PATIENCE), ANSWER_PATIENCE).await;
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

/// Whether whoever has connected is the daemon's own user, root or allowed.
pub(crate) fn may_control(stream: &UnixStream, allowed: &[u32]) -> bool {
    let own = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) => peer.uid() == own || peer.uid() == 0 || allowed.contains(&peer.uid()),
        Err(_) => false,
    }
}

/// Serves a connection until its client or `until` ends it. Then only the call that is under way is answered, since it is
/// carried out: it has `patience` for that.
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
        // How it ends is the client's affair.
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

    /// Longer than any test takes that works.
    const PATIENCE: Duration = Duration::from_secs(40);

    /// A call that says that it has begun, and answers only when it is told to.
    fn slow(begun: oneshot::Sender<()>, told: oneshot::Receiver<()>) -> Router {
        let signals = Arc::new(Mutex::new(Some((begun, told))));
        let call = async move || {
            let (begun, told) = signals.lock().unwrap().take().expect("it is called once");
            begun.send(()).unwrap();
            // Never, where nobody tells it.
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
        // The call cannot be over before the time of its connection is.
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

    /// They hold on to what they get, and would for as long as they like.
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
            // Some are hung up on.
            let _ = stream.write_all(ASK).await;
            crowd.push(stream);
        }
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(ASK).await.unwrap();
        let mut answer = [0; 12];
        let answered = tokio::time::timeout(PATIENCE, client.read_exact(&mut answer)).await;
        answered.expect("nobody may be kept waiting").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        // Beyond those of their own they get no place at all.
        let last = crowd.last_mut().unwrap();
        let hung_up = tokio::time::timeout(PATIENCE, last.read(&mut [0])).await.unwrap();
        assert!(matches!(hung_up, Ok(0) | Err(_)), "{hung_up:?}");
    }
}
