//! Scrapes a daemon with simulated VMMs.
#![expect(clippy::float_cmp, reason = "counts are exact, also as floating point numbers")]

mod text_format;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pagecast::server::ForkState as ServedState;
use pagecast::template::{Recording, TemplateOffset, WorkingSet};
use pagecast_client::{AddTemplate, Backend, Client, CreateFork};
use pagecast_testkit::peer::{FdKind, RawHandshake};
use pagecast_testkit::sim_vmm::{Connect, Pages, Read, SimVmm};
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use self::text_format::Scrape;
use crate::daemon::Daemon;
use crate::{Settings, metrics};

const PAGES: u64 = 256;
const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon in a folder of its own, with a template named `t`.
struct Rig {
    daemon: Daemon,
    client: Client,
    file: TemplateFile,
    _folder: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            run_dir: Some(folder.path().join("run")),
            metrics_addr: Some("127.0.0.1:0".parse().unwrap()),
            // Each fault is of one page, so that faults can be counted by pages.
            fault_around: Some(1),
            ..Settings::default()
        };
        let daemon = Daemon::start(settings.resolve().unwrap()).await.unwrap();
        let file = TemplateFile::create(TemplateModel::of_data(PAGES * PAGE, 1)).unwrap();
        let client = Client::new(daemon.control_socket());
        client.add_template("t", &AddTemplate::new(file.path())).await.unwrap();
        Self {
            daemon,
            client,
            file,
            _folder: folder,
        }
    }

    async fn scrape(&self) -> Scrape {
        Scrape::parse(&self.client.metrics().await.unwrap())
    }

    /// Creates a fork, and returns its socket.
    async fn fork(&self, id: &str) -> std::path::PathBuf {
        self.fork_with(id, Backend::Uffd).await
    }

    async fn fork_with(&self, id: &str, backend: Backend) -> std::path::PathBuf {
        let wanted = CreateFork {
            id: Some(id.to_owned()),
            backend: Some(backend),
            ..CreateFork::of("t")
        };
        self.client.create_fork(&wanted).await.unwrap().mem_backend.backend_path
    }

    /// Starts a VMM that has read its first `pages` pages.
    async fn reader(&self, id: &str, pages: u64) -> SimVmm {
        let socket = self.fork(id).await;
        let vmm = SimVmm::spawn().unwrap();
        vmm.run(Connect::new(socket, self.file.model())).unwrap();
        let read = vmm.run(Read {
            pages: Pages::range(0..pages),
            ..Read::default()
        });
        assert_eq!(read.unwrap().checked.mismatches, 0);
        vmm
    }

    /// Sets the working set of the template to these pages.
    fn learn(&self, pages: &[u64]) {
        let template = &self.daemon.service().registry().templates()[0].pages;
        let mut recording = Recording::new(template.len());
        for page in pages {
            recording.push(TemplateOffset::new(page * PAGE));
        }
        template.set_working_set(Some(Arc::new(WorkingSet::of(&recording))));
    }

    /// Waits until a fork has this state in the page server.
    fn wait(&self, id: &str, wanted: ServedState) {
        let forks = self.daemon.service().registry().forks();
        let fork = forks.iter().find(|fork| fork.id.as_str() == id).unwrap();
        let uffd = fork.uffd().expect("it is served");
        assert_eq!(
            uffd.served.wait(PATIENCE, |state| state == wanted).state,
            wanted,
            "{id}"
        );
    }
}

/// Causes each countable event at least once.
async fn eventful(rig: &Rig) {
    let vmm = rig.reader("all", PAGES).await;
    vmm.exit(0).unwrap();
    rig.wait("all", ServedState::Exited);

    let socket = rig.fork("refused").await;
    let stranger = SimVmm::spawn().unwrap();
    stranger.run(RawHandshake::new(&socket, "[]", &[])).unwrap();
    stranger
        .run(RawHandshake::new(socket, "GET /", &[FdKind::DevNull]))
        .unwrap();
    rig.wait("refused", ServedState::Failed);

    let killed = rig.reader("killed", 10).await;
    let service = Arc::clone(rig.daemon.service());
    service.server().fork(&"killed".parse().unwrap()).unwrap().kill();
    killed.wait().unwrap();
    rig.wait("killed", ServedState::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_scraped_is_what_the_api_says() {
    let rig = Rig::start().await;
    eventful(&rig).await;
    let _serving = rig.reader("serving", 1).await;
    rig.fork_with("file", Backend::File).await;

    let forks = rig.client.forks(false).await.unwrap();
    let scrape = rig.scrape().await;
    let of_t = [("template", "t")];
    for (backend, state) in [
        ("uffd", "waiting"),
        ("uffd", "serving"),
        ("uffd", "exited"),
        ("uffd", "failed"),
        ("file", "waiting"),
        ("file", "serving"),
    ] {
        let there = forks
            .iter()
            .filter(|fork| fork.backend.to_string() == backend && fork.state.to_string() == state)
            .count();
        let labels = [("template", "t"), ("backend", backend), ("state", state)];
        assert_eq!(
            scrape.sum("pagecast_forks", &labels),
            metrics::number(there as u64),
            "{labels:?}"
        );
    }
    assert_eq!(scrape.sum("pagecast_forks", &[]), 5.0);
    assert_eq!(scrape.sum("pagecast_forks_created_total", &of_t), 5.0);
    assert_eq!(scrape.sum("pagecast_forks_ended_total", &of_t), 3.0);

    // The last fault of the living VMM may not be counted yet.
    let ended = PAGES + 10;
    let demand = scrape.sum("pagecast_faults_total", &[("kind", "demand")]);
    assert!([ended, ended + 1].map(metrics::number).contains(&demand), "{demand}");
    let all = forks.iter().find(|fork| fork.id == "all").unwrap();
    assert_eq!(all.faults.unwrap().demand, PAGES);
    assert_eq!(all.installed_bytes, PAGES * PAGE);
    let installed = scrape.sum("pagecast_installed_bytes_total", &of_t);
    assert!(
        [ended, ended + 1]
            .map(|pages| metrics::number(pages * PAGE))
            .contains(&installed),
        "{installed}"
    );

    let expected = |reason: &str| BTreeMap::from([(reason.to_owned(), 1.0)]);
    assert_eq!(
        scrape.by("pagecast_refusals_total", "reason", &of_t),
        BTreeMap::from(["message_framing", "no_fd"].map(|reason| (reason.to_owned(), 1.0)))
    );
    assert_eq!(scrape.by("pagecast_kills_total", "reason", &of_t), expected("killed"));
    let failures = rig.daemon.service().server().failures();
    let failures = failures
        .into_iter()
        .map(|(code, count)| (code.to_owned(), metrics::number(count)));
    assert_eq!(
        scrape.by("pagecast_failures_total", "reason", &of_t),
        failures.collect()
    );

    assert_eq!(
        scrape.sum("pagecast_template_size_bytes", &of_t),
        metrics::number(PAGES * PAGE)
    );
    assert_eq!(scrape.by("pagecast_templates", "state", &[]), expected("ready"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_counts_down_when_forks_are_deleted_or_forgotten() {
    let rig = Rig::start().await;
    eventful(&rig).await;
    let before = rig.scrape().await;
    // Each of these faults installs one page, and both histograms count it.
    let demand = before.sum("pagecast_faults_total", &[("kind", "demand")]);
    assert_eq!(demand, metrics::number(PAGES + 10));
    for histogram in ["pagecast_fault_latency_seconds", "pagecast_install_latency_seconds"] {
        assert_eq!(before.sum(&format!("{histogram}_count"), &[]), demand, "{histogram}");
    }

    for id in ["all", "refused", "killed"] {
        rig.client.remove_fork(id, false).await.unwrap();
        let after = rig.scrape().await;
        after.check_not_below(&before);
        assert_eq!(after.sum("pagecast_faults_total", &[("kind", "demand")]), demand);
    }
    assert_eq!(rig.scrape().await.sum("pagecast_forks", &[]), 0.0);

    // A fork with a living VMM, and two that wait for one.
    let vmm = rig.reader("again", 3).await;
    rig.fork("waiting").await;
    rig.fork_with("file", Backend::File).await;
    let before = rig.scrape().await;
    rig.client.remove_fork("waiting", false).await.unwrap();
    rig.client.remove_fork("file", false).await.unwrap();
    rig.client.remove_fork("again", true).await.unwrap();
    vmm.wait().unwrap();
    let after = rig.scrape().await;
    after.check_not_below(&before);
    assert_eq!(
        after.by("pagecast_failures_total", "reason", &[]),
        [("closed", 1.0), ("killed", 2.0), ("message_framing", 1.0)]
            .map(|(reason, count)| (reason.to_owned(), count))
            .into()
    );
    assert_eq!(
        after.sum("pagecast_kills_total", &[]),
        2.0,
        "nobody is killed that is not there"
    );
    let deleted = [("backend", "file"), ("state", "waiting")];
    assert_eq!(after.sum("pagecast_forks_ended_total", &deleted), 1.0);
    let created = after.sum("pagecast_forks_created_total", &[]);
    assert_eq!(created, 6.0);
    assert_eq!(after.sum("pagecast_forks_ended_total", &[]), created, "none lives");
    let demand = after.sum("pagecast_faults_total", &[("kind", "demand")]);
    assert_eq!(demand, metrics::number(PAGES + 10 + 3));
    assert_eq!(after.sum("pagecast_fault_latency_seconds_count", &[]), demand);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_template_is_counted_until_its_last_fork_is_gone() {
    let rig = Rig::start().await;
    let vmm = rig.reader("late", 5).await;
    vmm.exit(0).unwrap();
    rig.wait("late", ServedState::Exited);
    let before = rig.scrape().await;
    rig.client.remove_template("t").await.unwrap();
    let after = rig.scrape().await;
    after.check_not_below(&before);
    assert!(!after.names().contains("pagecast_template_size_bytes"));
    rig.client.remove_fork("late", false).await.unwrap();
    assert!(!rig.scrape().await.values_of("template").contains("t"));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_by_path_and_never_by_what_a_client_makes_up() {
    let rig = Rig::start().await;
    rig.fork("a").await;
    for _ in 0..3 {
        assert!(rig.client.fork("nobody").await.is_err());
    }
    let http = pagecast_client::http::UnixHttp::new(rig.daemon.control_socket(), PATIENCE);
    let unheard = hyper::Method::from_bytes(b"UNHEARD").unwrap();
    for path in ["/v1/secret/1", "/v1/secret/2"] {
        http.request(unheard.clone(), path, None).await.unwrap();
    }
    http.request(hyper::Method::PATCH, "/v1/forks/a", None).await.unwrap();
    let scrape = rig.scrape().await;
    for (method, path, status, count) in [
        ("PUT", "/v1/templates/{name}", "201", 1.0),
        ("POST", "/v1/forks", "201", 1.0),
        ("GET", "/v1/forks/{id}", "404", 3.0),
        ("other", "other", "404", 2.0),
        ("PATCH", "/v1/forks/{id}", "405", 1.0),
    ] {
        let labels = [("method", method), ("path", path), ("status", status)];
        assert_eq!(scrape.sum("pagecast_http_requests_total", &labels), count, "{labels:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_tells_what_it_costs() {
    let rig = Rig::start().await;
    let scrape = rig.scrape().await;
    let value = |name| scrape.sum(name, &[]);
    let since_1970 = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    let age = since_1970 - value("process_start_time_seconds");
    // Both clocks tick, and are adjusted.
    assert!((-2.0..600.0).contains(&age), "{age}");
    assert!(value("pagecast_uptime_seconds") <= age + 2.0);
    let resident = value("process_resident_memory_bytes");
    assert!(
        resident > 1e6 && resident < value("process_virtual_memory_bytes"),
        "{resident}"
    );
    let open = value("process_open_fds");
    assert!(open > 10.0 && open < value("process_max_fds"), "{open}");
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    assert_eq!(scrape.sum("pagecast_build_info", &version), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_scraped_is_documented_and_the_other_way_round() {
    let rig = Rig::start().await;
    eventful(&rig).await;
    rig.learn(&[1, 5]);
    let scrape = rig.scrape().await;
    let of_t = [("template", "t")];
    assert_eq!(
        scrape.sum("pagecast_working_set_bytes", &of_t),
        metrics::number(2 * PAGE)
    );
    assert_eq!(scrape.sum("pagecast_working_set_recordings", &of_t), 1.0);
    assert_eq!(scrape.sum("pagecast_prefault_switched_off", &of_t), 0.0);
    let page = page();
    let documented = first_column(&page, |name| {
        name.starts_with("pagecast_") || name.starts_with("process_")
    });
    // These are absent while too few forks have had a working set prefaulted.
    let mut names = scrape.names();
    for name in ["pagecast_prefault_precision_ratio", "pagecast_prefault_recall_ratio"] {
        assert!(names.insert(name), "{name}");
    }
    assert_eq!(names, documented);
    let kinds = scrape.values_of("kind");
    assert!(first_column(&page, |_| true).is_superset(&kinds), "{kinds:?}");
}

#[test]
fn every_reason_is_documented_and_every_documented_reason_exists() {
    let page = page();
    let (_, tables) = page.split_once("## Reasons").unwrap();
    let documented = first_column(tables, |_| true);
    // The library's source files with these codes. There is no list of them at run time.
    let files = [
        "server/fork/fail_reason.rs",
        "server/fork/refusal.rs",
        "template/source.rs",
    ];
    let sources = files.map(|file| read(&format!("crates/pagecast/src/{file}")));
    let codes = sources.iter().flat_map(|source| source.lines()).filter_map(|line| {
        let (_, code) = line.split_once("=> \"")?;
        code.strip_suffix("\",")
    });
    // The daemon's own codes.
    let codes: BTreeSet<&str> = codes.chain(["server_died"]).collect();
    assert!(codes.len() > 30, "{codes:?}");
    assert_eq!(documented, codes);
}

fn page() -> String {
    read("docs/metrics.md")
}

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::read_to_string(root.join(path)).unwrap()
}

/// Returns the code in the first column of the page's tables.
fn first_column(page: &str, wanted: impl Fn(&str) -> bool) -> BTreeSet<&str> {
    page.lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name)
        .filter(|name| wanted(name))
        .collect()
}
