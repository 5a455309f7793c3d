//! Why a daemon does not start.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::run_dir::RunDirError;

/// Why a daemon does not start. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The run dir.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The kernel has no userfaultfd.
    #[error(
        "this kernel has no userfaultfd (CONFIG_USERFAULTFD), which `uffd` needs: use another kernel, or serve only `file` \
         forks with --backend file"
    )]
    NoUserfaultfd,
    /// The page server.
    #[error("the page server cannot start")]
    Server(#[source] pagecast::server::Error),
    /// A thread.
    #[error("a thread cannot start")]
    Thread {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What an earlier daemon has kept.
    #[error("the state of an earlier daemon in the run dir cannot be read")]
    State {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The control socket.
    #[error("cannot listen at {}", path.display())]
    Control {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The address of the metrics.
    #[error("cannot serve metrics on {addr}: choose another --metrics-addr")]
    Metrics {
        /// Which.
        addr: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
