//! Firecracker's API: HTTP over a unix socket, one connection for each request.

use std::io::{ErrorKind, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::Value;

/// Writing a snapshot of a large guest to a slow disk is the longest request.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const CONNECT_PACE: Duration = Duration::from_millis(2);
const MAX_RESPONSE: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    /// Waits until Firecracker answers at its socket. `alive` says whether it is still worth waiting.
    pub(crate) fn connect(socket: PathBuf, mut alive: impl FnMut() -> Result<()>) -> Result<Self> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        loop {
            alive()?;
            match UnixStream::connect(&socket) {
                Ok(_) => return Ok(Self { socket }),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| {
                        format!(
                            "Firecracker did not listen at {} in {CONNECT_TIMEOUT:?}",
                            socket.display()
                        )
                    });
                }
                Err(_) => thread::sleep(CONNECT_PACE),
            }
        }
    }

    pub(crate) fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.request("PUT", path, body)
    }

    pub(crate) fn patch(&self, path: &str, body: &Value) -> Result<()> {
        self.request("PATCH", path, body)
    }

    fn request(&self, method: &str, path: &str, body: &Value) -> Result<()> {
        let response = self
            .exchange(method, path, body)
            .with_context(|| format!("{method} {path} {body} failed"))?;
        ensure!(
            (200..300).contains(&response.status),
            "{method} {path} {body} was answered with {}: {}",
            response.status,
            response.reason()
        );
        Ok(())
    }

    fn exchange(&self, method: &str, path: &str, body: &Value) -> Result<Response> {
        let body = body.to_string();
        let mut stream = UnixStream::connect(&self.socket).context("failed to connect")?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .context("failed to send the request")?;
        Response::read(&stream, Instant::now() + ANSWER_TIMEOUT)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Response {
    status: u16,
    body: Vec<u8>,
}

impl Response {
    fn read(mut stream: &UnixStream, deadline: Instant) -> Result<Self> {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        loop {
            if let Some(response) = Self::parse(&bytes)? {
                return Ok(response);
            }
            ensure!(
                bytes.len() < MAX_RESPONSE,
                "the answer is longer than {MAX_RESPONSE} bytes"
            );
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no answer in time");
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut piece) {
                Ok(0) => bail!("the connection was closed in the middle of the answer"),
                Ok(count) => bytes.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    bail!("no answer in time")
                }
                Err(error) => return Err(error).context("failed to read the answer"),
            }
        }
    }

    /// `None` while there is more to come.
    fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(head) = response.parse(bytes).context("the answer is not HTTP")? else {
            return Ok(None);
        };
        let status = response.code.context("the answer has no status")?;
        let length = match response
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        {
            Some(header) => std::str::from_utf8(header.value)
                .map_err(|error| anyhow!(error))
                .and_then(|text| Ok(text.trim().parse::<usize>()?))
                .context("the answer has a bad Content-Length")?,
            None => 0,
        };
        Ok(bytes[head..].get(..length).map(|body| Self {
            status,
            body: body.to_vec(),
        }))
    }

    /// Firecracker's own words, which it wraps as `{"fault_message": …}`.
    fn reason(&self) -> String {
        serde_json::from_slice::<Value>(&self.body)
            .ok()
            .and_then(|body| Some(body.get("fault_message")?.as_str()?.to_owned()))
            .unwrap_or_else(|| String::from_utf8_lossy(&self.body).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULT: &[u8] =
        b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nContent-Length: 25\r\n\r\n{\"fault_message\":\"no way\"}";

    #[test]
    fn an_answer_that_comes_in_single_bytes_is_read_whole() -> Result<()> {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        for length in 0..whole.len() {
            assert_eq!(Response::parse(&whole[..length])?, None, "{length} bytes");
        }
        assert_eq!(
            Response::parse(whole)?,
            Some(Response {
                status: 200,
                body: b"{}".to_vec()
            })
        );
        Ok(())
    }

    #[test]
    fn an_answer_without_a_body_ends_with_its_head() -> Result<()> {
        let response = Response::parse(b"HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n")?;
        assert_eq!(
            response,
            Some(Response {
                status: 204,
                body: Vec::new()
            })
        );
        Ok(())
    }

    #[test]
    fn the_reason_of_a_refusal_is_firecrackers_own() -> Result<()> {
        let mut fault = FAULT.to_vec();
        // The length in the constant leaves out the last brace, so that what is not JSON is tested too.
        assert_eq!(
            Response::parse(&fault)?.context("incomplete")?.reason(),
            "{\"fault_message\":\"no way\""
        );
        let at = fault
            .windows(2)
            .position(|window| window == b"25")
            .context("no length")?;
        fault[at + 1] = b'6';
        assert_eq!(Response::parse(&fault)?.context("incomplete")?.reason(), "no way");
        Ok(())
    }

    #[test]
    fn what_is_not_http_is_an_error() {
        assert!(Response::parse(b"uffd handler here\r\n\r\n").is_err());
        assert!(Response::parse(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n").is_err());
    }

    #[test]
    fn a_peer_that_says_nothing_meets_the_deadline() -> Result<()> {
        let (stream, _silent) = UnixStream::pair()?;
        let error = Response::read(&stream, Instant::now() + Duration::from_millis(20)).expect_err("no answer came");
        assert_eq!(error.to_string(), "no answer in time");
        Ok(())
    }

    #[test]
    fn a_peer_that_goes_away_is_an_error() -> Result<()> {
        let (stream, mut peer) = UnixStream::pair()?;
        peer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal")?;
        drop(peer);
        assert!(Response::read(&stream, Instant::now() + Duration::from_secs(5)).is_err());
        Ok(())
    }
}
