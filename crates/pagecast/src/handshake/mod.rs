//! The message of a VMM: which part of the template each part of its memory is.
//!
//! Pure functions of bytes, in three steps. [`Framer`] finds the end of the message in a stream of any pieces.
//! [`parse`] parses it. [`Layout::validate`] validates it against the template. Each step refuses with a reason.
//!
//! Stock Firecracker sends a bare JSON array (`src/vmm/src/persist.rs`, `GuestRegionUffdMapping`):
//!
//! ```json
//! [{"base_host_virt_addr":139785,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]
//! ```
//!
//! `page_size_kib` is in **bytes** too, despite its name; some versions send only that. Others wrap the array into an
//! object as `mappings`. Unknown fields are ignored, so that newer VMMs are not refused.

mod framer;
mod layout;
mod message;

pub use framer::{FrameError, Framer};
pub use layout::{Layout, LayoutError};
pub use message::{ParseError, RequestedRegion, parse};

/// The longest message in bytes. Firecracker's has about 150 bytes a region and a handful of regions.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;

/// Most regions of a VMM.
pub const MAX_REGIONS: usize = 1024;
