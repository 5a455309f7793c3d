//! Installing pages that no thread waits for, on any thread: the steps, and the threads that help.

mod installer;
mod pool;
mod step;

pub(super) use installer::Done;
pub(super) use pool::FillPool;
pub(super) use step::{FillStep, Filled};
