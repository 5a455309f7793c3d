//! The limit of open file descriptors.

use rustix::process::{Resource, Rlimit};

/// Raises the soft limit to the hard one. Each fork takes three descriptors, and the usual soft limit of 1024 exists
/// for programs that use `select`.
pub(crate) fn raise() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // If the limit cannot be raised, VMMs beyond it wait in the socket's queue.
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}
