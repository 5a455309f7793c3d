//! Which pages of a template are zeros.
//!
//! | module | holds |
//! | --- | --- |
//! | `map` | what is known so far: a bit for each page |
//! | `search` | the search for the rest, in the background |
//! | `runs` | the long runs, once all is known: what a fork can leave to the kernel |
//! | `file` | how the map is kept beside a mem-file |

#[cfg(target_os = "linux")]
mod file;
mod map;
mod runs;
mod search;

#[cfg(target_os = "linux")]
pub use file::KeepError;
pub use map::ZeroMap;
#[cfg(target_os = "linux")]
pub(crate) use map::{is_zero, leading_zero_pages};
pub use runs::ZeroRuns;
pub(super) use search::ZeroSearch;
