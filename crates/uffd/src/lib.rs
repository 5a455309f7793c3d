//! The kernel side of pagecast: all calls to Linux about a fork's memory.
//!
//! | module | holds |
//! | --- | --- |
//! | [`address`] | addresses and ranges in a VMM's address space |
//! | [`event`] | messages from a `read` of a userfaultfd |
//! | [`feature`] | feature bits of a userfaultfd |
//! | [`outcome`] | results of an install: errno as an enum |
//! | `uffd` | the userfaultfd object and its ioctls (Linux) |
//! | `fd_passing` | file descriptors over a unix socket (Linux) |
//! | `peer` | the process at the other end of a unix socket (Linux) |
//! | `pidfd` | a process that cannot be mistaken for another (Linux) |
//! | `lease` | leases on files, which make writers wait (Linux) |
//! | `dirty` | dirty pages of a file (Linux) |
//! | `mapped_file` | files in the page cache: in large pages, and locked (Linux) |
//!
//! The first four are plain data and build on every platform; the others exist on Linux only. This crate has all kernel
//! ABI and all `unsafe` of the project.

pub mod address;
#[cfg_attr(
    not(any(target_os = "linux", test)),
    expect(dead_code, reason = "events are parsed where they are read")
)]
pub mod event;
pub mod feature;
pub mod outcome;

#[cfg(target_os = "linux")]
mod abi;
#[cfg(target_os = "linux")]
pub mod dirty;
#[cfg(target_os = "linux")]
pub mod fd_passing;
#[cfg(target_os = "linux")]
pub mod lease;
#[cfg(target_os = "linux")]
pub mod mapped_file;
#[cfg(target_os = "linux")]
pub mod peer;
#[cfg(target_os = "linux")]
pub mod pidfd;
#[cfg(target_os = "linux")]
pub mod thread_usage;
#[cfg(target_os = "linux")]
pub mod uffd;

pub use address::{ByteLen, HostAddr, HostRange};
pub use event::{Event, FaultFlags, PageFault};
pub use feature::Features;
pub use outcome::{Errno, Outcome};

#[cfg(target_os = "linux")]
pub use lease::LeaseBreaks;
#[cfg(target_os = "linux")]
pub use mapped_file::{MappedFile, MappedRange};
#[cfg(target_os = "linux")]
pub use peer::{Peer, PeerCredentials};
#[cfg(target_os = "linux")]
pub use pidfd::PidFd;
#[cfg(target_os = "linux")]
pub use uffd::{CreateError, Drained, EventBuffer, NotAUffd, Rejected, Uffd, UffdOptions};

/// Private functions for `pagecast-fuzz`.
#[cfg(all(feature = "fuzzing", target_os = "linux"))]
#[doc(hidden)]
pub mod fuzzing {
    /// The features in the fdinfo of a userfaultfd.
    pub fn features_of_fdinfo(info: &str) -> Option<u64> {
        crate::uffd::features_of_fdinfo(info)
    }
}
