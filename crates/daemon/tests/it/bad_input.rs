//! What bad input gets: a status, a code, and a message that names what is bad.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pagecast_testkit::skip::skip;
use serde_json::{Value, json};

use crate::fixture::Fixture;
use crate::http::{Answer, connect, exchange, read_to_end};
use crate::openapi;

fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.add_template();
    fixture
}

#[track_caller]
fn names(answer: &Answer, status: u16, code: &str, named: &str) {
    let message = answer.error(status, code);
    assert!(message.contains(named), "{named:?} is not in {message:?}");
}

#[test]
fn a_bad_body_is_refused_and_its_field_named() {
    let fixture = fixture();
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    let deep_field = [br#"{"template":"#.as_slice(), &deep, b"}"].concat();
    for (body, status, code, named) in [
        (b"".as_slice(), 400, "bad_request", "not JSON"),
        (b"{", 400, "bad_request", "not JSON"),
        (b"nonsense", 400, "bad_request", "not JSON"),
        (b"{} {}", 422, "invalid_field", "template"),
        (br#"{"template":"t"} {}"#, 400, "bad_request", "data after its end"),
        (b"\xff\xfe", 400, "bad_request", "not JSON"),
        (b"{\"template\":\"\xff\"}", 400, "bad_request", "not JSON"),
        (b"[]", 422, "invalid_field", "an object"),
        (
            br#" ["t",null,null,null,null,null,null,null,null,null]"#,
            422,
            "invalid_field",
            "an object",
        ),
        (b"null", 422, "invalid_field", "CreateFork"),
        (&deep, 422, "invalid_field", "an object"),
        (&deep_field, 422, "invalid_field", "template"),
        (br#"{"template":"t","template":"t"}"#, 422, "invalid_field", "template"),
        (br#"{"template":1}"#, 422, "invalid_field", "template"),
        (br#"{"template":"t","tempalte":"t"}"#, 422, "invalid_field", "tempalte"),
        (br#"{"template":"t","id":["f"]}"#, 422, "invalid_field", "id"),
        (br#"{"template":"t","backend":"tape"}"#, 422, "invalid_field", "backend"),
        (br#"{"template":"t","uid":-1}"#, 422, "invalid_field", "uid"),
        (br#"{"template":"t","gid":4294967296}"#, 422, "invalid_field", "gid"),
        (br#"{"template":"t","pid":1e99}"#, 422, "invalid_field", "pid"),
        (
            br#"{"template":"t","page_size":"4096"}"#,
            422,
            "invalid_field",
            "page_size",
        ),
        (
            br#"{"template":"t","prefault":"some"}"#,
            422,
            "invalid_field",
            "prefault",
        ),
        (br#"{"template":"t","path":7}"#, 422, "invalid_field", "path"),
    ] {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]);
        let answer = fixture.send_bytes("POST", "/v1/forks", body);
        let message = answer.json();
        assert_eq!(
            (answer.status, message["error"]["code"].as_str()),
            (status, Some(code)),
            "{shown}: {message:#}"
        );
        names(&answer, status, code, named);
    }
    let add = |body: &Value| fixture.send("PUT", "/v1/templates/u", body);
    let path = fixture.file.path();
    names(&add(&json!({})), 422, "invalid_field", "mem_path");
    names(&add(&json!({ "mem_path": null })), 422, "invalid_field", "mem_path");
    names(
        &add(&json!({ "mem_path": path, "size": 1 })),
        422,
        "invalid_field",
        "size",
    );
    names(
        &add(&json!({ "mem_path": path, "protect": "well" })),
        422,
        "invalid_field",
        "protect",
    );
    names(
        &add(&json!({ "mem_path": path, "page_size": 0 })),
        422,
        "invalid_field",
        "page_size",
    );
    names(
        &add(&json!({ "mem_path": path, "page_size": 8192 })),
        422,
        "invalid_field",
        "page_size",
    );
    names(
        &add(&json!({ "mem_path": "template.mem" })),
        422,
        "invalid_field",
        "mem_path",
    );
    names(
        &add(&json!({ "mem_path": path, "vmstate_path": "v" })),
        422,
        "invalid_field",
        "vmstate_path",
    );
    assert_eq!(fixture.kept("forks"), [""; 0]);
}

#[test]
fn a_body_of_a_mebibyte_is_taken_and_one_byte_more_is_not() {
    let fixture = fixture();
    let padded = |length: usize| {
        let mut body = br#"{"template":"t"}"#.to_vec();
        body.resize(length, b' ');
        body
    };
    fixture.send_bytes("POST", "/v1/forks", &padded(1 << 20)).ok(201);
    for length in [(1 << 20) + 1, 16 << 20] {
        for (method, path) in [("POST", "/v1/forks"), ("PUT", "/v1/templates/u")] {
            let answer = fixture.send_bytes(method, path, &padded(length));
            names(&answer, 413, "body_too_large", "1048576");
        }
    }
    // One that says so in advance is not even waited for.
    let head = b"POST /v1/forks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n";
    let mut stream = connect(&fixture.socket());
    std::io::Write::write_all(&mut stream, head).unwrap();
    let answer = Answer::parse(&read_to_end(&mut stream));
    openapi::check("POST", "/v1/forks", &answer);
    names(&answer, 413, "body_too_large", "1048576");
}

#[test]
fn a_bad_name_is_refused() {
    let fixture = fixture();
    let long = "a".repeat(65);
    for name in ["T", "-t", ".t", "..", "a b", "ü", "a/b", "", &long, "t\0"] {
        let answer = fixture.try_create(&json!({ "id": name }));
        names(&answer, 422, "invalid_field", "id");
        names(
            &fixture.send("POST", "/v1/forks", &json!({ "template": name })),
            404,
            "template_not_found",
            "template",
        );
    }
    let add = json!({ "mem_path": fixture.file.path() });
    for name in ["T", "-t", ".t", "a%20b", "%2e%2e", "a%2fb", "%00", "%c3%bc", &long] {
        let path = format!("/v1/templates/{name}");
        names(&fixture.send("PUT", &path, &add), 422, "invalid_field", "name");
        names(&fixture.ask("GET", &path), 404, "template_not_found", "template");
        names(&fixture.ask("DELETE", &path), 404, "template_not_found", "template");
        names(
            &fixture.ask("GET", &format!("/v1/forks/{name}")),
            404,
            "fork_not_found",
            "fork",
        );
    }
    fixture
        .send("PUT", &format!("/v1/templates/{}", "a".repeat(64)), &add)
        .ok(201);
}

#[test]
fn a_path_or_query_that_cannot_be_read_is_refused() {
    let fixture = fixture();
    for (method, path) in [
        ("GET", "/v1/templates/%ff"),
        ("PUT", "/v1/templates/%ff"),
        ("DELETE", "/v1/templates/%ff"),
        ("GET", "/v1/forks/%ff"),
        ("DELETE", "/v1/forks/%ff"),
        ("POST", "/v1/forks/%ff/complete"),
    ] {
        let answer = fixture.send("PUT", "/v1/templates/t", &json!({ "mem_path": fixture.file.path() }));
        answer.ok(200);
        names(&fixture.ask(method, path), 400, "bad_request", "UTF-8");
    }
    for (method, path) in [
        ("GET", "/v1/templates?memory=perhaps"),
        ("GET", "/v1/templates?mem=true"),
        ("GET", "/v1/forks?memory=1"),
        ("GET", "/v1/forks?memory=true&memory=true"),
        ("DELETE", "/v1/forks/f?kill=yes"),
        ("DELETE", "/v1/forks/f?force=true"),
        ("DELETE", "/v1/forks/f?kill"),
    ] {
        fixture.ask(method, path).error(400, "bad_request");
    }
}

#[test]
fn what_is_not_there_is_404_and_what_cannot_be_done_with_it_405() {
    let fixture = fixture();
    for path in [
        "/",
        "/v1",
        "/v2/forks",
        "/v1/forks/",
        "/v1/forks/f/",
        "/v1/forks/f/kill",
        "//v1/forks",
        "/metrics/",
    ] {
        fixture.ask("GET", path).error(404, "not_found");
    }
    for (method, path, allowed) in [
        ("POST", "/v1/templates", "GET,HEAD"),
        ("POST", "/v1/templates/t", "GET,HEAD,PUT,DELETE"),
        ("PUT", "/v1/forks", "GET,HEAD,POST"),
        ("GET", "/v1/forks/f/complete", "POST"),
        ("DELETE", "/v1/health", "GET,HEAD"),
        ("OPTIONS", "/v1/forks", "GET,HEAD,POST"),
        ("BREW", "/metrics", "GET,HEAD"),
    ] {
        let answer = fixture.ask(method, path);
        answer.error(405, "method_not_allowed");
        let mut told: Vec<_> = answer.headers["allow"].split(',').collect();
        let mut allowed: Vec<_> = allowed.split(',').collect();
        told.sort_unstable();
        allowed.sort_unstable();
        assert_eq!(told, allowed, "{method} {path}");
    }
}

#[test]
fn what_is_no_http_is_hung_up_on() {
    let fixture = fixture();
    for bytes in [
        b"GET / HTTP/9.9\r\n\r\n".as_slice(),
        b"\0\x01\x02\xff\xff\xff\xff\r\n\r\n",
        b"[{\"base_host_virt_addr\":0}]\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked, x\r\n\r\n",
    ] {
        assert_eq!(exchange(&fixture.socket(), bytes).status / 100, 4, "{bytes:?}");
    }
    let long = [b"GET /".as_slice(), &vec![b'a'; 1 << 20], b" HTTP/1.1\r\n\r\n"].concat();
    assert_eq!(exchange(&fixture.socket(), &long).status / 100, 4);
    fixture.ask("GET", "/v1/health").ok(200);
}

#[test]
fn a_file_that_cannot_be_a_template_is_refused_for_what_it_is() {
    let fixture = Fixture::new();
    let folder = fixture.folder.path();
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.join(name), bytes).unwrap();
        folder.join(name)
    };
    let fifo = folder.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let written = file("written", &[1; 4096]);
    let _writer = std::fs::File::options().write(true).open(&written).unwrap();
    let page = file("page", &[1; 4096]);
    let add = |body: Value| fixture.send("PUT", "/v1/templates/t", &body);
    for (path, named) in [
        (folder.to_owned(), "a directory"),
        (folder.join("nothing"), "No such file"),
        (folder.join("page/below"), "Not a directory"),
        (file("empty", b""), "0 bytes"),
        (file("odd", &[1; 4097]), "4097 bytes"),
        (fifo, "a fifo"),
        ("/dev/zero".into(), "a device"),
        (fixture.socket(), "No such device or address"),
        (written, "open for writing"),
        ("/".repeat(5000).into(), "File name too long"),
    ] {
        let answer = add(json!({ "mem_path": path }));
        names(&answer, 422, "template_invalid", named);
        names(&answer, 422, "template_invalid", "mem_path");
    }
    names(
        &add(json!({ "mem_path": page, "page_size": 2 << 20 })),
        422,
        "template_invalid",
        "2097152",
    );
    for (vmstate, named) in [
        (folder.to_owned(), "not a file"),
        (folder.join("nothing"), "No such file"),
    ] {
        let answer = add(json!({ "mem_path": page, "vmstate_path": vmstate }));
        names(&answer, 422, "template_invalid", "vmstate_path");
        names(&answer, 422, "template_invalid", named);
    }
    assert_eq!(fixture.kept("templates"), [""; 0]);
    add(json!({ "mem_path": page })).ok(201);
}

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    let fixture = Fixture::new();
    let secret = fixture.folder.path().join("secret");
    std::fs::write(&secret, [1; 4096]).unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    if std::fs::File::open(&secret).is_ok() {
        skip("may read every file");
        return;
    }
    let answer = fixture.send("PUT", "/v1/templates/t", &json!({ "mem_path": secret }));
    names(&answer, 422, "template_invalid", "Permission denied");
}

#[test]
fn a_path_outside_of_what_is_allowed_is_refused() {
    let fixture = Fixture::with(|folder, settings| {
        std::fs::create_dir(folder.join("jail")).unwrap();
        settings.allowed_dirs = Some(vec![folder.join("jail"), folder.join("later")]);
    });
    fixture.add_template();
    let folder = fixture.folder.path();
    let jail = folder.join("jail");
    std::os::unix::fs::symlink(folder, jail.join("out")).unwrap();
    std::fs::write(jail.join("there"), "").unwrap();
    let long = jail.join("x".repeat(108 - jail.as_os_str().len()));
    let create = |backend: &str, path: &Path| {
        let field = if backend == "uffd" { "socket_path" } else { "path" };
        (field, fixture.try_create(&json!({ "backend": backend, field: path })))
    };
    for backend in ["uffd", "file"] {
        for (path, named) in [
            (folder.join("f"), "outside of what is allowed"),
            (jail.join("../f"), "without `..`"),
            (jail.join("out/f"), "outside of what is allowed"),
            ("jail/f".into(), "absolute"),
            ("".into(), "absolute"),
            ("/".into(), "absolute"),
            (jail.join("deeper/f"), "its folder"),
            (folder.join("later/f"), "its folder"),
            (jail.join("x".repeat(300)), ""),
        ] {
            let (field, answer) = create(backend, &path);
            names(&answer, 422, "path_invalid", named);
            names(&answer, 422, "path_invalid", field.trim_start_matches("socket_"));
        }
        // What is there is never replaced.
        let (_, answer) = create(backend, &jail.join("there"));
        answer.error(422, "path_invalid");
        let (_, answer) = create(backend, &jail);
        answer.error(422, "path_invalid");
        create(backend, &jail.join(backend)).1.ok(201);
        create(backend, &fixture.run_dir().join(backend)).1.ok(201);
    }
    names(&create("uffd", &long).1, 422, "path_invalid", "107");
    create("file", &long).1.ok(201);
    assert_eq!(std::fs::read(jail.join("there")).unwrap(), b"");
    // The sockets and links of forks that were not made are not there.
    let mut left: Vec<_> = std::fs::read_dir(&jail)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            "file".as_ref(),
            "out".as_ref(),
            "there".as_ref(),
            "uffd".as_ref(),
            long.file_name().unwrap()
        ]
    );
}

#[test]
fn what_does_not_go_together_is_refused() {
    let fixture = fixture();
    let socket = fixture.folder.path().join("s");
    let refused = |fields: Value, code: &str, named: &str| {
        names(&fixture.try_create(&fields), 422, code, named);
    };
    refused(
        json!({ "backend": "file", "socket_path": socket }),
        "invalid_field",
        "socket_path",
    );
    refused(json!({ "backend": "uffd", "path": socket }), "invalid_field", "path");
    for field in ["uid", "gid"] {
        refused(json!({ "backend": "file", field: 1000 }), "invalid_field", field);
        // The memory file cannot be given to anybody.
        refused(json!({ "path": socket, field: 1000 }), "invalid_field", field);
    }
    refused(
        json!({ "path": socket, "socket_path": socket }),
        "invalid_field",
        "socket_path",
    );
    for needs_uffd in [
        json!({ "page_size": 2 << 20 }),
        json!({ "record": true }),
        json!({ "prefault": "all" }),
    ] {
        let mut fields = needs_uffd;
        fields["path"] = json!(socket);
        refused(fields, "invalid_field", "only `uffd`");
    }
    refused(
        json!({ "backend": "file", "page_size": 2 << 20 }),
        "backend_unavailable",
        "2 MiB",
    );
    for prefault in ["all", "working-set"] {
        refused(
            json!({ "prefault": prefault, "record": true }),
            "invalid_field",
            "prefault",
        );
    }
    refused(
        json!({ "prefault": "all", "backend": "file" }),
        "backend_unavailable",
        "prefault",
    );
    refused(
        json!({ "record": true, "backend": "file" }),
        "backend_unavailable",
        "recording",
    );
    refused(json!({ "page_size": 8192 }), "invalid_field", "page_size");
    for pid in [0, -1, 1, i32::MAX, std::process::id().cast_signed()] {
        refused(json!({ "backend": "file", "pid": pid }), "invalid_field", "pid");
    }
    assert_eq!(fixture.ask("GET", "/v1/forks").ok(200), json!([]));
    assert_eq!(fixture.kept("forks"), [""; 0]);
}
