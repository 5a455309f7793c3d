//! A simulated VMM: a process of its own that does to a page server exactly what Firecracker does, in its order and with
//! its flags, and that knows what every byte of its memory should be.
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
