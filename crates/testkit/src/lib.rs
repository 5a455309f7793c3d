//! Tools to test pagecast, or any other page server.
//!
//! | module | holds |
//! | --- | --- |
//! | [`sim_vmm`] | a process that behaves like Firecracker, and checks every byte it gets |
//! | [`peer`] | peers that do what Firecracker never does |
//! | [`firecracker`] | the real Firecracker, with a tiny guest that checks its memory |
//! | [`template_file`] | mem-files with known content |
//! | [`pattern`] | bytes that depend on their position |
//! | [`process`] | resources of a process |
//! | [`fuse_file`] | a file on a server whose attributes the kernel caches |
//! | [`floor`] | the smallest page server, to compare others with |
//! | [`cgroup`] | a memory cgroup for the time of a test |
//! | [`hugepages`] | hugepages for the time of a test |
//! | [`mounted`] | file systems that a test mounts |
//! | [`skip`] | tests that cannot run on this machine |
#![deny(unsafe_code)]

pub mod cgroup;
pub mod firecracker;
pub mod floor;
pub mod fuse_file;
pub mod hugepages;
pub mod mounted;
pub mod pattern;
pub mod peer;
pub mod process;
pub mod sim_vmm;
pub mod skip;
pub mod template_file;
pub mod transparent;

mod memory;

pub use memory::PageSize;
