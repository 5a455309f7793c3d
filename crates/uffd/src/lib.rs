//! The kernel side of pagecast.
