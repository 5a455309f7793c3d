//! The kernel side of pagecast: everything that speaks to Linux about a fork's memory.
//!
//! | module | holds |
//! | --- | --- |
//! | [`address`] | addresses and ranges in a VMM's address space |
//! | [`event`] | what a `read` of a userfaultfd returns, typed |
//! | [`feature`] | the feature bits a userfaultfd was created with |
//! | [`outcome`] | what an install came to: errno made meaning, once |
//! | `uffd` | the userfaultfd object and its ioctls (Linux) |
//! | `fd_passing` | file descriptors over a unix socket (Linux) |
//! | `peer` | who is at the other end of a unix socket (Linux) |
//! | `pidfd` | a process that cannot be mistaken for another (Linux) |
//! | `lease` | files that nobody can write without being made to wait (Linux) |
//! | `dirty` | what of a file is still to be written to its disk (Linux) |
//! | `mapped_file` | files in the page cache: in large pages, and kept there (Linux) |
//!
//! The first four are plain data and build on every platform; the rest exists on Linux only. All the kernel ABI of the
//! project, and its `unsafe`, is in this crate.

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

/// What `pagecast-fuzz` calls and is private.
#[cfg(all(feature = "fuzzing", target_os = "linux"))]
#[doc(hidden)]
pub mod fuzzing {
    /// The features that the fdinfo of a userfaultfd tells of.
    pub fn features_of_fdinfo(info: &str) -> Option<u64> {
        crate::uffd::features_of_fdinfo(info)
    }
}
