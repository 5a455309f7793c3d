//! Tools to test pagecast.
