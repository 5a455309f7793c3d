//! The pagecast library.
