//! An error with all its causes, as text and in JSON.

use std::fmt::Write;

use serde::ser::SerializeStruct;

/// An error with all its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// Serializes an error with a code as `{"code", "message"}`. The message includes all its causes.
pub(super) fn serialize_reason<S: serde::Serializer>(
    to: S,
    code: &str,
    reason: &dyn std::error::Error,
) -> Result<S::Ok, S::Error> {
    let mut object = to.serialize_struct("Reason", 2)?;
    object.serialize_field("code", code)?;
    object.serialize_field("message", &chain(reason))?;
    object.end()
}
