//! Tools to test pagecast.

pub mod firecracker;
