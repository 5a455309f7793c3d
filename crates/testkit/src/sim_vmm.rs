//! A simulated VMM: a process that makes the same calls to a page server as Firecracker, in its order and with its
//! flags, and that knows the expected content of every byte of its memory.
//!
//! A test holds a [`SimVmm`], asks it to [`run`](SimVmm::run) or [`start`](SimVmm::start) some [`Work`] (such as
//! [`Connect`], [`MapFile`], [`Read`]), and gets the report of that work back.

mod guest;
mod handle;
mod machine;
mod protocol;
mod work;

pub use handle::{Job, SimVmm};
pub use machine::run;
pub use protocol::*;
