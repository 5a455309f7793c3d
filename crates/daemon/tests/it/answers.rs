//! Every answer that the `OpenAPI` document has of a call is given to it.

use pagecast_testkit::sim_vmm::SimVmm;
use serde_json::{Value, json};

use crate::fixture::{Fixture, PATIENCE};
use crate::openapi;

/// Why an answer with this code is not asked for here.
fn elsewhere(code: &str) -> Option<&'static str> {
    match code {
        "forbidden" => {
            Some("takes another user, and comes before it is looked at what the call is: `codes::forbidden`")
        }
        "internal" => Some("takes a daemon that is broken, and comes from one place for all calls: `codes::internal`"),
        // Of `warm` it is not tested at all: that takes a host with less memory than a template has.
        "not_enough_memory" => Some("takes a pool of hugepages that is used up: `codes::not_enough_memory`"),
        _ => None,
    }
}

#[test]
fn every_answer_that_is_documented_is_given() {
    good_calls();
    bad_calls();
    changed_templates();
    full_and_closing();
    let given = openapi::checked();
    let missing: Vec<_> = openapi::documented()
        .into_iter()
        .filter(|kind| elsewhere(&kind.3).is_none() && !given.contains(kind))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

fn add(fixture: &Fixture) -> Value {
    json!({ "mem_path": fixture.file.path() })
}

fn good_calls() {
    let fixture = Fixture::new();
    fixture.send("PUT", "/v1/templates/t", &add(&fixture)).ok(201);
    fixture.send("PUT", "/v1/templates/t", &add(&fixture)).ok(200);
    fixture.send("POST", "/v1/templates/t/warm", &json!({})).ok(202);
    let vmm = fixture.serving("f", "uffd");
    for path in [
        "/metrics",
        "/v1/health",
        "/v1/templates",
        "/v1/templates/t",
        "/v1/forks",
        "/v1/forks/f",
    ] {
        assert_eq!(fixture.ask("GET", path).status, 200, "{path}");
    }
    fixture.ask("DELETE", "/v1/forks/f").error(409, "fork_in_use");
    fixture.ask("DELETE", "/v1/templates/t").error(409, "template_in_use");
    fixture.ask("POST", "/v1/forks/f/complete").ok(202);
    fixture.await_fork("f", "complete");
    vmm.kill().unwrap();
    fixture.ask("DELETE", "/v1/forks/f").ok(204);
    fixture.ask("DELETE", "/v1/templates/t/warm").ok(204);
    fixture.ask("DELETE", "/v1/templates/t").ok(204);
}

fn bad_calls() {
    let fixture = Fixture::new();
    fixture.add_template();
    fixture.create(&json!({ "id": "file", "backend": "file" }));
    fixture.create(&json!({ "id": "uffd", "backend": "uffd" }));
    fixture.serving("ended", "uffd").kill().unwrap();
    fixture.await_fork("ended", "exited");
    for path in ["/v1/templates?memory=1", "/v1/forks?memory=1"] {
        fixture.ask("GET", path).error(400, "bad_request");
    }
    for (method, path, code) in [
        ("GET", "/v1/templates/{}", "template_not_found"),
        ("DELETE", "/v1/templates/{}", "template_not_found"),
        ("DELETE", "/v1/templates/{}/warm", "template_not_found"),
        ("GET", "/v1/forks/{}", "fork_not_found"),
        ("DELETE", "/v1/forks/{}", "fork_not_found"),
        ("POST", "/v1/forks/{}/complete", "fork_not_found"),
    ] {
        fixture.ask(method, &path.replace("{}", "none")).error(404, code);
        fixture
            .ask(method, &path.replace("{}", "%ff"))
            .error(400, "bad_request");
    }
    for (id, code) in [
        ("uffd", "fork_waiting"),
        ("ended", "fork_ended"),
        ("file", "not_completable"),
    ] {
        fixture
            .ask("POST", &format!("/v1/forks/{id}/complete"))
            .error(409, code);
    }
    for (method, path) in [
        ("PUT", "/v1/templates/u"),
        ("POST", "/v1/templates/t/warm"),
        ("POST", "/v1/forks"),
    ] {
        fixture.send_bytes(method, path, b"{").error(400, "bad_request");
        let long = vec![b' '; (1 << 20) + 1];
        fixture.send_bytes(method, path, &long).error(413, "body_too_large");
        fixture
            .send(method, path, &json!({ "neither": 1 }))
            .error(422, "invalid_field");
    }
    fixture
        .send("POST", "/v1/templates/none/warm", &json!({}))
        .error(404, "template_not_found");
    fixture
        .send("PUT", "/v1/templates/u", &json!({ "mem_path": "/" }))
        .error(422, "template_invalid");
    let other = json!({ "mem_path": fixture.file.path(), "page_size": 2 << 20 });
    fixture
        .send("PUT", "/v1/templates/t", &other)
        .error(409, "template_exists");
    for (fields, status, code) in [
        (json!({ "template": "none" }), 404, "template_not_found"),
        (json!({ "id": "file" }), 409, "fork_exists"),
        (
            json!({ "backend": "file", "page_size": 2 << 20 }),
            422,
            "backend_unavailable",
        ),
        (json!({ "path": "relative" }), 422, "path_invalid"),
    ] {
        fixture.try_create(&fields).error(status, code);
    }
}

fn changed_templates() {
    let fixture = Fixture::new();
    fixture.add_template();
    let add = add(&fixture);
    std::fs::rename(fixture.file.path(), fixture.folder.path().join("elsewhere")).unwrap();
    fixture.try_create(&json!({})).error(409, "template_changed");
    for (method, path, body) in [
        ("PUT", "/v1/templates/t", add),
        ("POST", "/v1/templates/t/warm", json!({})),
    ] {
        fixture.send(method, path, &body).error(409, "template_changed");
    }
}

fn full_and_closing() {
    let fixture = Fixture::with(|_, settings| settings.max_forks = Some(1));
    fixture.add_template();
    let vmm = SimVmm::spawn().unwrap();
    fixture.create(&json!({ "backend": "file", "pid": vmm.pid() }));
    fixture.try_create(&json!({})).error(429, "too_many_forks");
    fixture.runtime.block_on(fixture.daemon().close(PATIENCE)).unwrap();
    fixture.try_create(&json!({})).error(503, "closing");
    for (method, path, body) in [
        ("PUT", "/v1/templates/u", add(&fixture)),
        ("POST", "/v1/templates/t/warm", json!({})),
    ] {
        fixture.send(method, path, &body).error(503, "closing");
    }
}
