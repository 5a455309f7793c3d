//! Every call as it should be: what is asked, what is answered. Each answer is held against the `OpenAPI` document too.

use pagecast_client::fork::BackendType;
use pagecast_client::template::{Guard, Protection, TemplateState};
use pagecast_client::{AddTemplate, Backend, Client, CreateFork, ErrorCode, ForkState};
use pagecast_testkit::sim_vmm::SimVmm;
use serde_json::{Value, json};

use crate::fixture::{Fixture, SIZE, reads_right};

#[test]
fn a_template_is_added_once_listed_shown_and_removed() {
    let fixture = Fixture::new();
    assert_eq!(fixture.ask("GET", "/v1/templates").ok(200), json!([]));
    let vmstate = fixture.folder.path().join("vmstate");
    std::fs::write(&vmstate, "state").unwrap();
    let add = json!({ "mem_path": fixture.file.path(), "vmstate_path": vmstate });
    let added = fixture.send("PUT", "/v1/templates/t", &add).ok(201);
    assert_eq!(added["name"], "t");
    assert_eq!(added["mem_path"], fixture.file.path().to_str().unwrap());
    assert_eq!(added["vmstate_path"], vmstate.to_str().unwrap());
    assert_eq!(added["state"], "ready");
    assert_eq!(
        (&added["size_bytes"], &added["page_size"]),
        (&json!(SIZE), &json!(4096))
    );
    assert_eq!(
        (&added["forks"], &added["memory"], &added["working_set"]),
        (&json!(0), &Value::Null, &Value::Null)
    );
    // The holes are known at once.
    assert!(added["zero_bytes"].as_u64().unwrap() >= 100 * 4096, "{added:#}");

    let again = fixture.send("PUT", "/v1/templates/t", &add).ok(200);
    assert_eq!(again["name"], "t");
    let shown = fixture.template();
    assert_eq!(shown["size_bytes"], SIZE);
    assert_eq!(fixture.ask("GET", "/v1/templates").ok(200).as_array().unwrap().len(), 1);
    assert_eq!(fixture.ask("GET", "/v1/templates?memory=false").ok(200)[0]["name"], "t");

    fixture.ask("DELETE", "/v1/templates/t").ok(204);
    fixture.ask("GET", "/v1/templates/t").error(404, "template_not_found");
    fixture
        .ask("DELETE", "/v1/templates/t")
        .error(404, "template_not_found");
    assert_eq!(fixture.kept("templates"), [""; 0]);
    // The name is free.
    fixture.add_template();
}

#[test]
fn a_fork_says_what_to_tell_firecracker_and_why() {
    let fixture = Fixture::new();
    fixture.add_template();
    let auto = fixture.create(&json!({ "id": "auto" }));
    assert_eq!(
        (&auto["id"], &auto["template"], &auto["backend"]),
        (&json!("auto"), &json!("t"), &json!("file"))
    );
    assert_eq!(auto["mem_backend"]["backend_type"], "File");
    assert!(
        auto["reason"].as_str().unwrap().contains("share every page"),
        "{auto:#}"
    );

    let huge = fixture.create(&json!({ "id": "huge", "page_size": 2 << 20 }));
    assert_eq!(
        (&huge["backend"], &huge["mem_backend"]["backend_type"]),
        (&json!("uffd"), &json!("Uffd"))
    );
    assert!(huge["reason"].as_str().unwrap().contains("2 MiB"), "{huge:#}");
    assert_eq!(
        huge["mem_backend"]["backend_path"],
        fixture.run_dir().join("forks/huge.sock").to_str().unwrap()
    );

    let named = fixture.create(&json!({}));
    let other = fixture.create(&json!({}));
    assert_ne!(named["id"], other["id"]);

    let shown = fixture.fork("huge");
    assert_eq!(shown["state"], "waiting");
    assert_eq!(
        (&shown["pid"], &shown["memory"], &shown["memory_bytes"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
    assert_eq!(
        (&shown["faults"]["demand"], &shown["installed_bytes"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(fixture.fork("auto")["faults"], Value::Null);
    let ids = |path| {
        let forks = fixture.ask("GET", path).ok(200);
        let ids = forks
            .as_array()
            .unwrap()
            .iter()
            .map(|fork| fork["id"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(ids("/v1/forks"), ids("/v1/forks?memory=false"));
    assert_eq!(ids("/v1/forks").len(), 4);
    assert_eq!(fixture.template()["forks"], 4);

    for id in ids("/v1/forks") {
        fixture.ask("DELETE", &format!("/v1/forks/{id}")).ok(204);
        fixture
            .ask("DELETE", &format!("/v1/forks/{id}"))
            .error(404, "fork_not_found");
        fixture
            .ask("POST", &format!("/v1/forks/{id}/complete"))
            .error(404, "fork_not_found");
    }
    assert_eq!(ids("/v1/forks"), [""; 0]);
    assert_eq!(fixture.kept("forks"), [""; 0]);
}

#[test]
fn auto_is_the_backend_that_has_what_was_asked_for() {
    let fixture = Fixture::new();
    fixture.add_template();
    let place = fixture.folder.path().canonicalize().unwrap().join("place");
    let own = rustix::process::geteuid().as_raw();
    for (fields, backend, named) in [
        (json!({ "socket_path": place }), "uffd", "socket_path"),
        (json!({ "uid": own }), "uffd", "uid"),
        (
            json!({ "gid": rustix::process::getegid().as_raw(), "backend": "auto" }),
            "uffd",
            "gid",
        ),
        (json!({ "path": place }), "file", "path"),
    ] {
        let created = fixture.create(&fields);
        assert_eq!(created["backend"], backend, "{fields}");
        assert!(created["reason"].as_str().unwrap().contains(named), "{created:#}");
        if named.ends_with("path") {
            assert_eq!(created["mem_backend"]["backend_path"], place.to_str().unwrap());
        }
        fixture
            .ask("DELETE", &format!("/v1/forks/{}", created["id"].as_str().unwrap()))
            .ok(204);
    }
}

#[test]
fn health_and_metrics_tell_of_the_daemon() {
    let fixture = Fixture::new();
    fixture.add_template();
    fixture.create(&json!({}));
    let health = fixture.ask("GET", "/v1/health").ok(200);
    assert_eq!(health["status"], "ok");
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(health["pid"], std::process::id());
    assert_eq!(
        (&health["templates"], &health["forks"]),
        (&json!(1), &json!({ "waiting": 1 }))
    );
    assert!(health["rss_bytes"].as_u64().unwrap() > 0);
    let metrics = fixture.ask("GET", "/metrics");
    assert_eq!(
        (metrics.status, &*metrics.headers["content-type"]),
        (200, "text/plain; version=0.0.4")
    );
}

/// As Firecracker takes it too: `curl -d` calls it a form.
#[test]
fn json_is_taken_whatever_it_is_called() {
    let fixture = Fixture::new();
    fixture.add_template();
    for content_type in [
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/json; charset=utf-8",
        "?",
    ] {
        let body = r#"{ "template": "t" }"#;
        let request = format!(
            "POST /v1/forks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {content_type}\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        crate::http::exchange(&fixture.socket(), request.as_bytes()).ok(201);
    }
    // In pieces, as whoever does not know its length sends it.
    let chunked = "POST /v1/forks HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
                   b\r\n{ \"template\r\n7\r\n\": \"t\"}\r\n0\r\n\r\n";
    crate::http::exchange(&fixture.socket(), chunked.as_bytes()).ok(201);
}

#[test]
fn a_name_may_be_percent_encoded_and_head_is_get_without_a_body() {
    let fixture = Fixture::new();
    fixture.add_template();
    assert_eq!(fixture.ask("GET", "/v1/templates/%74").ok(200)["name"], "t");
    let head = fixture.ask("HEAD", "/v1/templates/t");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(fixture.ask("HEAD", "/v1/templates/u").status, 404);
}

#[test]
fn the_client_makes_every_call() {
    let fixture = Fixture::new();
    let client = Client::new(fixture.socket());
    let path = fixture.file.path();
    let vmm = SimVmm::spawn().unwrap();
    fixture.runtime.block_on(async {
        let health = client.health().await.unwrap();
        assert_eq!((health.pid, health.templates), (std::process::id(), 0));
        let add = AddTemplate::new(path);
        let template = client.add_template("t", &add).await.unwrap();
        assert_eq!(
            (template.state, template.protect),
            (TemplateState::Ready, Protection::None)
        );
        assert!(matches!(template.guard, Guard::Lease | Guard::Watch));
        assert_eq!(client.template("t").await.unwrap().size_bytes, SIZE);
        assert_eq!(client.templates().await.unwrap().len(), 1);
        let other = AddTemplate {
            page_size: Some(2 << 20),
            ..add
        };
        let error = client.add_template("t", &other).await.unwrap_err();
        let pagecast_client::ClientError::Api(error) = error else {
            panic!("{error:?}")
        };
        assert_eq!(error.code, ErrorCode::TemplateExists);

        let wanted = CreateFork {
            backend: Some(Backend::Uffd),
            ..CreateFork::of("t")
        };
        let created = client.create_fork(&wanted).await.unwrap();
        assert_eq!(
            (created.backend, created.mem_backend.backend_type),
            (Backend::Uffd, BackendType::Uffd)
        );
        tokio::task::block_in_place(|| {
            fixture.restore(&vmm, &serde_json::to_value(&created).unwrap());
            fixture.await_fork(&created.id, "serving");
        });
        let fork = client.fork(&created.id).await.unwrap();
        assert_eq!((fork.state, fork.memory_bytes), (ForkState::Serving, Some(SIZE)));
        assert!(fork.memory.is_some());
        assert!(client.forks(false).await.unwrap()[0].memory.is_none());
        client.complete_fork(&created.id).await.unwrap();
        tokio::task::block_in_place(|| fixture.await_fork(&created.id, "complete"));
        client.remove_fork(&created.id, false).await.unwrap();
        client.remove_template("t").await.unwrap();
        assert!(client.template("../health").await.is_err(), "a name is one segment");
        client.metrics().await.unwrap();
    });
    reads_right(&vmm);
}
