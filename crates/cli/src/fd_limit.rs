//! How many file descriptors we may have.

use rustix::process::{Resource, Rlimit};

/// Raises the limit as far as we may: each fork holds three, and the usual soft limit of 1024 is for programs that use
/// `select`.
pub(crate) fn raise() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Where that is not allowed, VMMs beyond the limit wait in the socket's queue.
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}
