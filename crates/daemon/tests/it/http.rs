//! HTTP as bytes over a unix socket: what a client library would never send can be sent too.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::fixture::PATIENCE;
use crate::openapi;

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut head = httparse::Response::new(&mut headers);
        let parsed = head.parse(bytes);
        let Ok(httparse::Status::Complete(length)) = parsed else {
            panic!("{parsed:?}: {:?}", String::from_utf8_lossy(bytes));
        };
        let value = |header: &httparse::Header<'_>| String::from_utf8(header.value.to_vec()).unwrap();
        Self {
            status: head.code.unwrap(),
            headers: head
                .headers
                .iter()
                .map(|header| (header.name.to_ascii_lowercase(), value(header)))
                .collect(),
            body: bytes[length..].to_vec(),
        }
    }

    /// Its body as JSON; null where it has none.
    pub(crate) fn json(&self) -> Value {
        if self.body.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    /// Its body as JSON, where it has this status.
    #[track_caller]
    pub(crate) fn ok(&self, status: u16) -> Value {
        let json = self.json();
        assert_eq!(self.status, status, "{json:#}");
        json
    }

    /// The message of an error with this status and code.
    #[track_caller]
    pub(crate) fn error(&self, status: u16, code: &str) -> String {
        let json = self.ok(status);
        assert_eq!(json["error"]["code"], code, "{json:#}");
        let message = json["error"]["message"].as_str().unwrap();
        assert!(!message.is_empty());
        message.to_owned()
    }
}

/// Sends a request and holds the answer against the `OpenAPI` document.
#[track_caller]
pub(crate) fn call(socket: &Path, method: &str, path: &str, body: &[u8]) -> Answer {
    let answer = exchange(socket, &request(method, path, body));
    openapi::check(method, path, &answer);
    answer
}

/// A request as bytes.
pub(crate) fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Sends bytes and reads to the end of the answer, which has to come.
#[track_caller]
pub(crate) fn exchange(socket: &Path, bytes: &[u8]) -> Answer {
    let mut stream = connect(socket);
    // A server need not read all that it refuses.
    let _ = stream.write_all(bytes);
    Answer::parse(&read_to_end(&mut stream))
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// All that comes until the server closes the connection.
pub(crate) fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        // It has not read all that was sent.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error}: {:?}", String::from_utf8_lossy(&bytes)),
    }
    bytes
}
