//! Decisions by the memory that is left: which VMMs are served, and which completions begin.

mod completion;
mod hugepages;
mod memory;

pub(super) use completion::ZEROS_PATIENCE;
pub(super) use hugepages::admit;
pub(super) use memory::{check_room, find_zeros};
