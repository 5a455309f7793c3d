//! Why a daemon does not start.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::run_dir::RunDirError;

/// Why a daemon does not start. Each message says how to fix it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The run dir cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The kernel has no userfaultfd.
    #[error(
        "this kernel has no userfaultfd (CONFIG_USERFAULTFD), which `uffd` needs: use another kernel, or serve only `file` \
         forks with --backend file"
    )]
    NoUserfaultfd,
    /// The page server cannot start.
    #[error("the page server cannot start")]
    Server(#[source] pagecast::server::Error),
    /// A thread cannot start.
    #[error("a thread cannot start")]
    Thread {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The state of an earlier daemon cannot be read.
    #[error("the state of an earlier daemon in the run dir cannot be read")]
    State {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The control socket cannot be bound.
    #[error("cannot listen at {}", path.display())]
    Control {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The address of the metrics cannot be bound.
    #[error("cannot serve metrics on {addr}: choose another --metrics-addr")]
    Metrics {
        /// The address.
        addr: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
