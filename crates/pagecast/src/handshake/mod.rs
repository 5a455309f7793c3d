//! The one message a VMM sends: which of its memory is which part of the template.
//!
//! Pure functions of bytes, in three steps. [`Framer`] finds where the message ends in a stream that may come in any
//! pieces; [`parse`] reads it; [`Layout::validate`] holds it against the template. Whatever is refused, each step says why.
//!
//! Stock Firecracker sends a bare JSON array (`src/vmm/src/persist.rs`, `GuestRegionUffdMapping`):
//!
//! ```json
//! [{"base_host_virt_addr":139785,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]
//! ```
//!
//! `page_size_kib` is in **bytes** too, despite its name; some versions send only that. Others wrap the array into an
//! object as `mappings`. Unknown fields are ignored, so that a newer VMM is not refused for saying more.

mod framer;
mod layout;
mod message;

pub use framer::{FrameError, Framer};
pub use layout::{Layout, LayoutError};
pub use message::{ParseError, RequestedRegion, parse};

/// The longest message that is read, in bytes. Firecracker's has about 150 bytes a region and a handful of regions.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;

/// The most regions one VMM may have.
pub const MAX_REGIONS: usize = 1024;
