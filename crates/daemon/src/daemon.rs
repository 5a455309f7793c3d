//! The daemon, from start to stop.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pagecast::server::CloseError;
use pagecast_client::Backend;
use pagecast_uffd::uffd::CreateError;
use pagecast_uffd::{Features, Uffd, UffdOptions};
use rustix::io::Errno;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::api::{self, Api, listen};
use crate::config::Config;
use crate::error::StartError;
use crate::own_thread::{OwnThread, survive};
use crate::run_dir::RunDir;
use crate::service::Service;

/// A running daemon. Dropping it stops its API at once; its forks are completed, or killed if that takes too long.
pub struct Daemon {
    service: Arc<Service>,
    tasks: JoinSet<()>,
    /// Tasks that block.
    own_threads: Vec<OwnThread>,
}

impl Daemon {
    /// Locks the run dir, takes up the templates and forks of an earlier daemon, and listens.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: Config) -> Result<Self, StartError> {
        check_userfaultfd(config.backend)?;
        let shared = !config.allowed_uids.is_empty();
        let run_dir = RunDir::take(&config.run_dir, shared)?;
        let allowed = config.allowed_uids.clone();
        let idle = config.complete_idle_after;
        let metrics = match config.metrics_addr {
            Some(addr) => {
                let listener = TcpListener::bind(addr).await;
                Some(listener.map_err(|source| StartError::Metrics { addr, source })?)
            }
            None => None,
        };

        let (events, happened) = mpsc::channel();
        let runtime = tokio::runtime::Handle::current();
        let service = tokio::task::spawn_blocking(move || {
            // The receiver is gone only while the daemon stops.
            Service::start_up(config, run_dir, runtime, move |event| drop(events.send(event)))
        })
        .await
        .map_err(|panic| StartError::Thread {
            source: std::io::Error::other(panic),
        })??;
        let listener = Arc::downgrade(&service);
        std::thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || {
                for event in happened {
                    let Some(service) = listener.upgrade() else { return };
                    survive("events", || service.on_event(&event));
                }
            })
            .map_err(|source| StartError::Thread { source })?;

        let path = service.run_dir().control_socket();
        // If other users are allowed, the user of each connection is checked.
        let mode = if shared { 0o666 } else { 0o600 };
        let control = listen::bind(&path, mode).map_err(|source| StartError::Control { path, source })?;
        let api = Api {
            service: Arc::clone(&service),
            requests: Arc::default(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(listen::serve_control(
            control,
            api::router(api.clone()),
            api::forbidden_router(api.clone()),
            move |stream| listen::may_control(stream, &allowed),
        ));
        if let Some(listener) = metrics {
            tasks.spawn(listen::serve_metrics(listener, api::metrics_router(api)));
        }
        tasks.spawn(Arc::clone(&service).end_overdue());
        let thread = |source| StartError::Thread { source };
        let watch = Arc::clone(&service).watch_templates();
        let mut own_threads = vec![OwnThread::start("watch", watch).map_err(thread)?];
        if let Some(after) = idle {
            let idle = Arc::clone(&service).complete_idle(after);
            own_threads.push(OwnThread::start("idle", idle).map_err(thread)?);
        }
        info!(
            event = "ready",
            control_socket = %service.run_dir().control_socket().display(),
            version = env!("CARGO_PKG_VERSION"),
            "pagecast is ready"
        );
        Ok(Self {
            service,
            tasks,
            own_threads,
        })
    }

    /// The path of its control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.service.run_dir().control_socket()
    }

    /// The service behind the API.
    #[cfg(test)]
    pub(crate) fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Completes all forks with `uffd`, so that their VMMs run on without a daemon. Refuses new forks meanwhile. The
    /// API answers until this daemon is dropped.
    ///
    /// # Errors
    ///
    /// [`CloseError`] if the forks do not fit into memory, or take longer than `timeout`. The daemon keeps serving.
    pub async fn close(&self, timeout: Duration) -> Result<(), CloseError> {
        self.service.set_closing(true);
        let service = Arc::clone(&self.service);
        let closed = off_the_runtime(move || service.server().close(timeout)).await;
        match closed {
            Ok(()) => self.service.forget_ended(),
            // The page server keeps serving.
            Err(CloseError::NotEnoughMemory { .. }) => self.service.set_closing(false),
            Err(_) => {}
        }
        closed
    }

    /// Kills the VMMs of all forks with `uffd` that are not complete.
    ///
    /// # Errors
    ///
    /// [`CloseError::NotComplete`] if some have not died within `timeout`.
    pub async fn kill(&self, timeout: Duration) -> Result<(), CloseError> {
        self.service.set_closing(true);
        let service = Arc::clone(&self.service);
        let killed = off_the_runtime(move || service.server().kill(timeout)).await;
        self.service.forget_ended();
        killed
    }

    /// Returns the number of forks that need the daemon: those with `uffd` that wait or are served.
    pub fn serving(&self) -> usize {
        let forks = self.service.registry().forks();
        forks.iter().filter(|fork| fork.needs_daemon()).count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.tasks.abort_all();
        self.own_threads.clear();
        // Forks of a template that is about to be written end first: its lease ends with this process.
        for withdrawal in self.service.take_withdrawals() {
            // Its thread has logged a panic.
            let _ = withdrawal.join();
        }
        self.service.keep_all();
        // The socket has no listener any more.
        let _ = std::fs::remove_file(self.control_socket());
    }
}

async fn off_the_runtime<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Checks that this kernel has userfaultfd. The daemon itself needs none, and whether a VMM may create one is not
/// checked.
fn check_userfaultfd(backend: Backend) -> Result<(), StartError> {
    let created = Uffd::create(UffdOptions {
        features: Features::empty(),
        nonblocking: true,
    });
    let Err(CreateError::Unavailable { syscall, .. }) = created else {
        return Ok(());
    };
    match Errno::from_raw_os_error(syscall.get()) {
        Errno::NOSYS if backend == Backend::File => {
            warn!("this kernel has no userfaultfd: only forks with `file` are possible");
            Ok(())
        }
        Errno::NOSYS => Err(StartError::NoUserfaultfd),
        // The kernel has it, but this process may not create one.
        _ => Ok(()),
    }
}
