//! The pages of a template that are zeros.
//!
//! | module | holds |
//! | --- | --- |
//! | `map` | the pages known so far: one bit for each |
//! | `runs` | the long runs, once all zeros are known: a fork can leave them to the kernel |

mod map;
mod runs;

pub use map::ZeroMap;
#[cfg(target_os = "linux")]
pub(crate) use map::{is_zero, leading_zero_pages};
pub use runs::ZeroRuns;
