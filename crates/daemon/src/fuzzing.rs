//! What `pagecast-fuzz` calls and is private, as functions of bytes.

use pagecast_client::ApiError;
use serde::de::DeserializeOwned;

use crate::fork::SavedFork;
use crate::local_file::SavedTemplate;
use crate::run_dir::{decode, encode};

/// Reads the body of a request.
///
/// # Errors
///
/// The status and error that are answered.
pub fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, (u16, ApiError)> {
    crate::api::body(bytes)
}

/// Reads what is saved of a template, and writes it again.
///
/// # Errors
///
/// It cannot be read.
pub fn saved_template(bytes: &[u8]) -> serde_json::Result<Vec<u8>> {
    encode(&decode::<SavedTemplate>(bytes)?)
}

/// Reads what is saved of a fork, and writes it again.
///
/// # Errors
///
/// It cannot be read.
pub fn saved_fork(bytes: &[u8]) -> serde_json::Result<Vec<u8>> {
    encode(&decode::<SavedFork>(bytes)?)
}
