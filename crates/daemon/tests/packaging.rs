//! What is in `packaging`: the unit, the configuration and the dashboard say what is true.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args as _;
use pagecast_daemon::{Config, Settings};
use pagecast_testkit::skip::{Need, skip};

/// Where the unit expects the command.
const INSTALLED: &str = "/usr/bin/pagecast";

fn path(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(of)
}

fn read(of: &str) -> String {
    std::fs::read_to_string(path(of)).unwrap()
}

/// The settings of the example as they are once somebody has taken away the `#` before each.
fn uncommented() -> String {
    let example = read("packaging/config.toml");
    let lines = example.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if !setting.starts_with(' ') => setting,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn config(text: &str) -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    Settings::read(file.path()).unwrap().resolve().unwrap()
}

#[test]
fn the_example_configuration_names_every_setting_and_no_other() {
    let table: toml::Table = uncommented().parse().unwrap();
    let there: BTreeSet<&str> = table.keys().map(String::as_str).collect();
    let command = Settings::augment_args(clap::Command::new("serve"));
    let settings: BTreeSet<&str> = command
        .get_arguments()
        .map(|setting| setting.get_id().as_str())
        .collect();
    assert_eq!(there, settings);
}

#[test]
fn the_example_configuration_shows_the_defaults() {
    let shipped = config(&read("packaging/config.toml"));
    let defaults = Settings::default().resolve().unwrap();
    assert_eq!(format!("{shipped:?}"), format!("{defaults:?}"), "nothing is set by it");

    // But for what has no default to show.
    let shown = Config {
        workers: defaults.workers,
        allowed_uids: defaults.allowed_uids.clone(),
        allowed_dirs: defaults.allowed_dirs.clone(),
        metrics_addr: defaults.metrics_addr,
        complete_idle_after: defaults.complete_idle_after,
        ..config(&uncommented())
    };
    assert_eq!(format!("{shown:?}"), format!("{defaults:?}"));
}

#[test]
fn systemd_understands_the_unit() {
    let folder = tempfile::tempdir().unwrap();
    let unit = read("packaging/pagecast.service");
    assert!(unit.contains(INSTALLED));
    let copy = folder.path().join("pagecast.service");
    // It has to be there and executable.
    let anything = std::env::current_exe().unwrap();
    std::fs::write(&copy, unit.replace(INSTALLED, anything.to_str().unwrap())).unwrap();
    let verified = Command::new("systemd-analyze").arg("verify").arg(&copy).output();
    let verified = match verified {
        Err(error) if error.kind() == ErrorKind::NotFound => return skip(Need::Program("systemd-analyze")),
        verified => verified.unwrap(),
    };
    let said = String::from_utf8_lossy(&verified.stderr);
    // It looks at all that the unit depends on; what is wrong there is not for us to mend.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("pagecast.service")).collect();
    assert!(ours.is_empty(), "{said}");
}

#[test]
fn the_unit_has_no_mount_namespace_of_its_own() {
    // `systemd.exec(5)`: each of these makes one, in which bind mounts would be seen by no VMM.
    const PRIVATE: [&str; 22] = [
        "BindPaths",
        "BindReadOnlyPaths",
        "DynamicUser",
        "ExecPaths",
        "InaccessiblePaths",
        "MountAPIVFS",
        "MountFlags",
        "NoExecPaths",
        "PrivateDevices",
        "PrivateMounts",
        "PrivateTmp",
        "ProcSubset",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "ProtectSystem",
        "ReadOnlyPaths",
        "RootDirectory",
        "TemporaryFileSystem",
    ];
    let unit = read("packaging/pagecast.service");
    let set: Vec<&str> = unit
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(directive, _)| directive)
        .filter(|directive| PRIVATE.contains(directive))
        .collect();
    assert!(set.is_empty(), "{set:?}");
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let dashboard: serde_json::Value = serde_json::from_str(&read("packaging/grafana/pagecast.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let queries = targets
        .map(|target| &target["expr"])
        .chain(variables.iter().filter_map(|variable| variable.get("definition")));
    let page = read("docs/metrics.md");
    let mut asked = BTreeSet::new();
    for query in queries {
        let query = query.as_str().unwrap();
        let words = query.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
        let metrics: Vec<&str> = words
            .filter(|word| word.starts_with("pagecast_") || word.starts_with("process_"))
            .collect();
        assert!(!metrics.is_empty(), "{query}");
        for metric in metrics {
            let is_there = |name: &str, kind: &str| page.contains(&format!("| `{name}` | {kind} |"));
            let histogram = metric.strip_suffix("_bucket");
            let known = match histogram {
                Some(histogram) => is_there(histogram, "histogram"),
                // A counter is of no use but by its rate.
                None if query.contains(&format!("increase({metric}{{"))
                    || query.contains(&format!("rate({metric}{{")) =>
                {
                    is_there(metric, "counter")
                }
                None => is_there(metric, "gauge") || query.starts_with("label_values("),
            };
            assert!(known, "{metric} in {query}");
            asked.insert(metric.to_owned());
        }
    }
    assert!(asked.len() > 15, "{asked:?}");
}
