//! Private parsers that `pagecast-fuzz` calls, as functions of bytes.

use pagecast_client::ApiError;
use serde::de::DeserializeOwned;

use crate::fork::SavedFork;
use crate::local_file::SavedTemplate;
use crate::run_dir::{decode, encode};

/// Reads the body of a request.
///
/// # Errors
///
/// The status and error of the response.
pub fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, (u16, ApiError)> {
    crate::api::body(bytes)
}

/// Parses the saved record of a template, and serializes it again.
///
/// # Errors
///
/// The record cannot be parsed.
pub fn saved_template(bytes: &[u8]) -> serde_json::Result<Vec<u8>> {
    encode(&decode::<SavedTemplate>(bytes)?)
}

/// Parses the saved record of a fork, and serializes it again.
///
/// # Errors
///
/// The record cannot be parsed.
pub fn saved_fork(bytes: &[u8]) -> serde_json::Result<Vec<u8>> {
    encode(&decode::<SavedFork>(bytes)?)
}
