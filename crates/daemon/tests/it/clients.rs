//! Clients that are slow, half open, or no clients at all: they harm nobody but themselves.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pagecast_testkit::process::ProcessUse;
use pagecast_testkit::skip::skip;
use serde_json::json;

use crate::fixture::{Fixture, PATIENCE, eventually, reads_right};
use crate::http::{Answer, connect, read_to_end, request};

/// More than the daemon takes at once.
const CROWD: usize = 300;

/// How long a request may take beside a crowd: it may have to wait until the daemon hangs up on some of them.
const PROMPT: Duration = Duration::from_secs(20);

fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.add_template();
    fixture
}

fn open_fds() -> usize {
    ProcessUse::of(std::process::id()).unwrap().fds
}

/// Whether this test has a process of its own, as `cargo nextest` gives it. Says that the test is skipped where not.
fn alone() -> bool {
    let alone = std::env::var("NEXTEST_EXECUTION_MODE").is_ok_and(|mode| mode == "process-per-test");
    if !alone {
        skip("needs a process of its own: run it with `cargo nextest`");
    }
    alone
}

/// Connections that have each sent the same bytes.
fn crowd(fixture: &Fixture, bytes: &[u8]) -> Vec<UnixStream> {
    let socket = fixture.socket();
    (0..CROWD)
        .map(|_| {
            let mut stream = connect(&socket);
            stream.write_all(bytes).unwrap();
            stream
        })
        .collect()
}

fn asked_in_time(fixture: &Fixture) {
    let started = Instant::now();
    fixture.ask("GET", "/v1/health").ok(200);
    let took = started.elapsed();
    assert!(took < PROMPT, "{took:?}");
}

/// The crowd does as it likes; forks are served meanwhile, others are answered, and nothing is left of it in the end.
fn harmless(bytes: &[u8]) {
    if !alone() {
        return;
    }
    let fixture = fixture();
    let vmm = fixture.serving("f", "uffd");
    // From then on it is held.
    eventually("its process is known", || fixture.fork("f")["memory"].is_object());
    let before = open_fds();
    let crowd = crowd(&fixture, bytes);
    reads_right(&vmm);
    asked_in_time(&fixture);
    // Hung up on, though they never ask.
    for mut stream in crowd {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let bytes = read_to_end(&mut stream);
        if !bytes.is_empty() {
            assert_eq!(Answer::parse(&bytes).status / 100, 4);
        }
    }
    eventually("no file descriptor is left", || open_fds() <= before);
    asked_in_time(&fixture);
}

#[test]
fn connections_that_say_nothing_are_hung_up_on() {
    harmless(b"");
}

#[test]
fn half_a_head_is_not_waited_for_for_ever() {
    harmless(b"POST /v1/forks HTTP/1.1\r\nHost: local");
}

#[test]
fn a_body_that_never_comes_is_not_waited_for_for_ever() {
    harmless(b"POST /v1/forks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{");
}

#[test]
fn garbage_is_hung_up_on() {
    harmless(&[b"\0\xff\r\n".as_slice(), &[0xaa; 1000], b"\r\n\r\n"].concat());
}

/// Asks for as long as the socket takes it, and reads no answer.
#[test]
fn clients_that_never_read_keep_nobody_else_from_it() {
    if !alone() {
        return;
    }
    let fixture = fixture();
    for number in 0..50 {
        fixture.create(&json!({ "id": format!("f{number}") }));
    }
    let before = open_fds();
    let ask = b"GET /v1/forks?memory=false HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
    let crowd: Vec<_> = (0..20)
        .map(|_| {
            let mut stream = connect(&fixture.socket());
            stream.set_nonblocking(true).unwrap();
            // Until neither side's buffers take more.
            let until = Instant::now() + Duration::from_secs(2);
            while Instant::now() < until && stream.write(&ask).is_ok() {}
            stream
        })
        .collect();
    for _ in 0..10 {
        asked_in_time(&fixture);
    }
    drop(crowd);
    eventually("no file descriptor is left", || open_fds() <= before);
}

/// A client that goes away in the middle of its call has made it all the same, or not at all.
#[test]
fn clients_that_go_away_leave_nothing_behind() {
    if !alone() {
        return;
    }
    let fixture = fixture();
    let before = open_fds();
    for number in 0..200 {
        let body = json!({ "template": "t", "backend": "uffd", "id": format!("f{number}") }).to_string();
        let bytes = request("POST", "/v1/forks", body.as_bytes());
        let mut stream = connect(&fixture.socket());
        stream
            .write_all(&bytes[..bytes.len() - usize::from(number % 2 == 0)])
            .unwrap();
    }
    // What was made is there to be deleted, and no more comes.
    eventually("nothing is left", || {
        let forks = fixture.ask("GET", "/v1/forks?memory=false").ok(200);
        for fork in forks.as_array().unwrap() {
            let path = format!("/v1/forks/{}", fork["id"].as_str().unwrap());
            fixture.ask("DELETE", &path).ok(204);
        }
        // One that is just being made is not listed, and keeps the template.
        fixture.kept("forks").is_empty()
            && open_fds() <= before
            && fixture.ask("DELETE", "/v1/templates/t").status == 204
    });
    fixture.add_template();
}

#[test]
fn many_requests_on_one_connection_are_answered_in_their_order() {
    let fixture = fixture();
    let mut stream = connect(&fixture.socket());
    let one = b"GET /v1/templates/t HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let none = b"GET /v1/templates/u HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(&[one.as_slice(), none].concat().repeat(20)).unwrap();
    stream.write_all(&request("GET", "/v1/health", b"")).unwrap();
    let text = String::from_utf8(read_to_end(&mut stream)).unwrap();
    let statuses: Vec<&str> = text.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses[..40], ["200", "404"].repeat(20));
    assert_eq!(statuses[40..], ["200"]);
}

/// As many calls at once as there are clients, on the same names.
#[test]
fn calls_at_once_agree_on_who_was_first() {
    let fixture = Fixture::new();
    let add = json!({ "mem_path": fixture.file.path() }).to_string();
    let each = |method: &'static str, path: &str, body: &str| {
        let (socket, bytes) = (fixture.socket(), request(method, path, body.as_bytes()));
        let statuses = std::thread::scope(|scope| {
            let asking: Vec<_> = (0..16)
                .map(|_| scope.spawn(|| crate::http::exchange(&socket, &bytes).status))
                .collect();
            asking
                .into_iter()
                .map(|asking| asking.join().unwrap())
                .collect::<Vec<_>>()
        });
        let count = |status| statuses.iter().filter(|other| **other == status).count();
        (count(201) + count(204), count(200), count(409), count(404))
    };
    for _ in 0..5 {
        let (new, same, busy, _) = each("PUT", "/v1/templates/t", &add);
        assert_eq!((new, same + busy), (1, 15));
        let (new, _, exists, _) = each("POST", "/v1/forks", r#"{"template":"t","id":"f","backend":"uffd"}"#);
        assert_eq!((new, exists), (1, 15));
        // Whoever comes while it is being deleted may hear that it was.
        let (deleted, _, _, unknown) = each("DELETE", "/v1/forks/f", "");
        assert_eq!(deleted + unknown, 16);
        assert!(deleted > 0);
        let (deleted, _, _, unknown) = each("DELETE", "/v1/templates/t", "");
        assert_eq!((deleted, unknown), (1, 15));
    }
}
