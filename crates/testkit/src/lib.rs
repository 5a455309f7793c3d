//! Tools to test pagecast, or any other page server.
//!
//! | module | holds |
//! | --- | --- |
//! | [`sim_vmm`] | a process that does what Firecracker does, and checks every byte it is given |
//! | [`peer`] | peers that do what Firecracker never does |
//! | [`firecracker`] | the real Firecracker, with a tiny guest that checks its memory |
//! | [`template_file`] | mem-files that know what is in them |
//! | [`pattern`] | bytes that tell where they belong |
//! | [`process`] | what a process holds |
//! | [`fuse_file`] | a file on a server whose attributes the kernel keeps in a cache |
//! | [`floor`] | the smallest page server, to measure others against |
//! | [`cgroup`] | a memory cgroup for the time of a test |
//! | [`hugepages`] | hugepages for the time of a test |
//! | [`mounted`] | file systems of a test's own |
//! | [`skip`] | tests that cannot run here, and say so |
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
