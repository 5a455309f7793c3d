//! The body of a request.

use std::fmt::Debug;

use pagecast_client::template::Warm;
use pagecast_client::{AddTemplate, CreateFork, ErrorCode};
use pagecast_daemon::fuzzing::body;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Each kind of body is accepted or refused, for any call.
pub(crate) fn run(bytes: &[u8]) {
    read::<AddTemplate>(bytes);
    read::<CreateFork>(bytes);
    read::<Warm>(bytes);
}

/// An accepted body is a JSON object, and is read again as it was written. A refused body is an error of the client,
/// with a message.
fn read<T: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) {
    match body::<T>(bytes) {
        Ok(value) => {
            let json: Value = serde_json::from_slice(bytes).expect("what is accepted is JSON");
            assert!(json.is_object(), "{json}");
            let written = serde_json::to_vec(&value).expect("it can be written");
            assert_eq!(body::<T>(&written).expect("what was written is read"), value);
        }
        Err((status, error)) => {
            assert!((400..500).contains(&status), "{status} {error:?}");
            assert!(
                matches!(error.code, ErrorCode::BadRequest | ErrorCode::InvalidField),
                "{error:?}"
            );
            assert!(!error.message.is_empty());
        }
    }
}
