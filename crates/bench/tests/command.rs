//! `pagecast-bench`: that it measures, says and draws what it should. How fast anything is, no test asks.
#![expect(clippy::unwrap_used, reason = "what a test needs and does not get fails it")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pagecast_testkit::firecracker::kvm;
use pagecast_testkit::skip::skip;
use serde_json::Value;

const SECTIONS: [&str; 6] = ["faults", "ready", "prefault", "zeros", "fanout", "growth"];

/// What the command says and how it ends. It finds `pagecast` beside itself.
fn output(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagecast-bench"));
    for variable in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(variable);
    }
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// What it said, which is text.
fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_owned()).unwrap()
}

/// What as little as possible of a section came to.
fn tiny(section: &str) -> Value {
    tiny_with(section, &[])
}

fn tiny_with(section: &str, arguments: &[&str]) -> Value {
    let measured = output(&[&["--tiny", "--only", section, "--json"], arguments].concat());
    assert!(measured.status.success(), "{section}: {measured:?}");
    serde_json::from_slice(&measured.stdout).unwrap_or_else(|error| panic!("{section}: {error}: {measured:?}"))
}

/// The one section of a report, held against what all of them have.
fn section(report: &Value, name: &str) -> Value {
    assert_eq!(report["scale"], "tiny");
    assert!(report["machine"]["kernel"].is_string(), "{report}");
    let sections = report["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 1);
    let section = &sections[0];
    assert_eq!(section["section"], name);
    for row in section["rows"].as_array().unwrap() {
        assert!(row["name"].is_string() && row["setting"].is_string(), "{row}");
        for (measure, value) in row["values"].as_object().unwrap() {
            let [min, median, max] = ["min", "median", "max"].map(|key| value[key].as_f64().unwrap());
            assert!(min <= median && median <= max, "{measure}: {value}");
        }
    }
    for goal in section["goals"].as_array().unwrap() {
        let verdict = goal["verdict"].as_str().unwrap();
        assert!(["met", "missed", "too_noisy_to_tell"].contains(&verdict), "{goal}");
        assert!(
            goal["goal"]["at_most"].is_number() || goal["goal"]["at_least"].is_number(),
            "{goal}"
        );
    }
    section.clone()
}

/// The rows of a section, as "setting / name", each with what was measured of it.
fn rows(section: &Value) -> Vec<(String, Value)> {
    let rows = section["rows"].as_array().unwrap().iter();
    rows.map(|row| {
        let [setting, name] = ["setting", "name"].map(|key| row[key].as_str().unwrap());
        (format!("{setting} / {name}"), row["values"].clone())
    })
    .collect()
}

fn assert_has(section: &Value, row: &str, measures: &[&str]) {
    let rows = rows(section);
    let found = rows.iter().find(|(name, _)| name == row);
    let (_, values) = found.unwrap_or_else(|| panic!("no {row:?} in {rows:#?}"));
    for measure in measures {
        assert!(values[measure].is_object(), "{row}: no {measure} in {values}");
    }
}

fn goals(section: &Value) -> Vec<String> {
    let goals = section["goals"].as_array().unwrap().iter();
    goals.map(|goal| goal["what"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn faults_are_measured_beside_the_floor() {
    let section = section(&tiny("faults"), "faults");
    for setting in [
        "1 fork, one CPU",
        "1 fork, two CPUs",
        "1 fork, in order, one CPU",
        "1 fork, in order, two CPUs",
        "4 forks",
        "20 forks",
    ] {
        for name in [
            "floor: bare loop",
            "pagecast",
            "pagecast, resident template",
            "pagecast, no fault-around",
            "pagecast, no polling",
        ] {
            let measures = [
                "fault_p50_us",
                "fault_p99_us",
                "fault_max_us",
                "faults_per_second",
                "cpu_per_fault_us",
            ];
            assert_has(&section, &format!("{setting} / {name}"), &measures);
        }
    }
    assert_eq!(
        goals(&section),
        [
            "demand fault p50, one CPU, resident template",
            "demand fault p50, two CPUs, resident template",
            "faults per second, 20 forks, resident template",
            "demand fault p50, one CPU",
            "demand fault p50, two CPUs",
            "faults per second, 20 forks",
        ]
    );
}

#[test]
fn another_page_server_is_measured_beside() {
    let pagecast = Path::new(env!("CARGO_BIN_EXE_pagecast-bench")).with_file_name("pagecast");
    let rival = format!("{} handle --socket {{socket}} --mem-file {{mem}}", pagecast.display());
    let section = section(&tiny_with("faults", &["--rival", &rival]), "faults");
    for setting in ["1 fork, one CPU", "20 forks"] {
        let measures = ["fault_p50_us", "faults_per_second"];
        assert_has(&section, &format!("{setting} / rival"), &measures);
    }
    for (rival, problem) in [
        ("true {socket}", "{mem} is missing"),
        ("true {socket} {mem}", "ended before its socket existed"),
    ] {
        let refused = output(&["--tiny", "--only", "faults", "--rival", rival]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused.stderr).contains(problem), "{refused:?}");
    }
}

#[test]
fn a_working_set_is_got_ready_in_every_way() {
    let section = section(&tiny("ready"), "ready");
    for name in [
        "floor: plain MAP_PRIVATE",
        "file",
        "uffd, prefault",
        "uffd, on demand",
        "rival: a page a fault",
        "rival: all at the first fault",
    ] {
        assert_has(&section, &format!("warm / {name}"), &["ready_ms", "installed_mib"]);
    }
    let installed = |name: &str| {
        let rows = rows(&section);
        let (_, values) = rows.iter().find(|(row, _)| *row == format!("warm / {name}")).unwrap();
        values["installed_mib"]["median"].as_f64().unwrap()
    };
    // 2 MiB are read of 16 MiB.
    for (name, least, most) in [
        ("file", 0.0, 0.0),
        ("rival: a page a fault", 2.0, 2.0),
        ("uffd, on demand", 2.0, 2.5),
        ("rival: all at the first fault", 16.0, 16.0),
    ] {
        let installed = installed(name);
        assert!((least..=most).contains(&installed), "{name}: {installed}");
    }
    if section["warnings"].to_string().contains("nothing hot") {
        skip(&format!("a template cannot be made resident: {}", section["warnings"]));
    } else {
        assert_has(&section, "warm / file, hot", &["ready_ms"]);
    }
    let has_cold = rows(&section).iter().any(|(name, _)| name.starts_with("cold"));
    let says_why_not = section["warnings"].to_string().contains("nothing cold");
    assert_ne!(has_cold, says_why_not, "{section}");
}

#[test]
fn bulk_prefault_and_fresh_memory_are_measured() {
    let prefault = section(&tiny("prefault"), "prefault");
    for name in ["floor: one thread of bulk UFFDIO_COPY", "pagecast, prefault of all"] {
        assert_has(&prefault, &format!(" / {name}"), &["gib_per_second", "processors_used"]);
    }
    let zeros = section(&tiny("zeros"), "zeros");
    for how in ["written", "read"] {
        for name in [
            "floor: plain anonymous memory",
            "uffd, given back",
            "rival: a page a fault",
        ] {
            assert_has(&zeros, &format!("{how} / {name}"), &["nanos_per_page"]);
        }
    }
    assert_eq!(goals(&zeros), ["fresh memory, for runs given back"]);
}

#[test]
fn many_forks_are_measured_in_firecracker_or_it_says_that_they_are_simulated() {
    let section = section(&tiny("fanout"), "fanout");
    for backend in ["file", "uffd, prefault", "uffd, on demand"] {
        let measures = [
            "resumed_ms",
            "ready_ms",
            "ready_p99_ms",
            "demand_faults",
            "private_mib",
            "private_sum_mib",
            "pss_mib",
            "server_cpu_seconds",
        ];
        assert_has(&section, &format!("2 forks / {backend}"), &measures);
    }
    let warnings = section["warnings"].to_string();
    assert_eq!(
        warnings.contains("simulated"),
        kvm().unwrap().skips(),
        "where there is KVM, and only there, Firecracker is real: {section}"
    );
}

#[test]
fn growth_is_measured_with_forks_and_with_templates() {
    let section = section(&tiny("growth"), "growth");
    for forks in ["1", "3"] {
        assert_has(
            &section,
            &format!("{forks} / forks of 1 GiB"),
            &["server_mib", "start_ms", "wakeups"],
        );
    }
    for row in ["3, time 2 / idle afterwards", "3 + 1 / and more that wait for a VMM"] {
        assert_has(&section, row, &["server_mib", "wakeups", "fds"]);
    }
    for template in ["16 MiB template", "32 MiB template"] {
        assert_has(
            &section,
            &format!("{template} / one fork"),
            &["fault_p50_us", "add_template_ms"],
        );
    }
    let goals = goals(&section);
    assert_eq!(goals.len(), 3);
    assert!(goals[1].contains("time 2 to time 1"), "{goals:?}");
}

#[test]
fn pictures_and_json_are_written_where_they_were_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (plots, json) = (folder.path().join("new/plots"), folder.path().join("other/report.json"));
    let argument = |path: &Path| path.to_str().unwrap().to_owned();
    let measured = output(&[
        "--tiny",
        "--only",
        "zeros,faults",
        "--plots",
        &argument(&plots),
        "--json",
        &argument(&json),
    ]);
    assert!(measured.status.success(), "{measured:?}");
    // Tables go to stdout all the same, in the order of the sections.
    let said = text(&measured.stdout);
    let order =
        ["faults", "20 forks", "zeros", "goals"].map(|word| said.find(word).unwrap_or_else(|| panic!("{said}")));
    assert!(order.is_sorted(), "{said}");
    let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["sections"].as_array().unwrap().len(), 2);
    for name in ["faults", "zeros", "goals"] {
        let svg = fs::read_to_string(plots.join(format!("{name}.svg"))).unwrap();
        assert!(
            svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
            "{name}: {svg}"
        );
        let png = fs::read(plots.join(format!("{name}.png"))).unwrap();
        assert!(png.starts_with(b"\x89PNG\r\n\x1a\n") && png.len() > 10_000, "{name}");
    }
    assert!(!plots.join("growth.svg").exists(), "what was not measured is not drawn");
}

#[test]
fn tables_can_be_had_as_markdown() {
    let measured = output(&["--tiny", "--only", "prefault", "--markdown"]);
    assert!(measured.status.success(), "{measured:?}");
    let said = text(&measured.stdout);
    assert!(
        said.contains("## prefault") && said.contains("| --- | ---: |"),
        "{said}"
    );
}

#[test]
fn what_cannot_be_written_is_known_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = output(&["--tiny", "--plots", file.join("plots").to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stdout.is_empty(), "{refused:?}");
    assert!(text(&refused.stderr).contains("cannot create"), "{refused:?}");
}

#[test]
fn help_names_every_section_and_no_hidden_option() {
    let help = text(&output(&["--help"]).stdout);
    for section in SECTIONS {
        assert!(help.contains(section), "{section}: {help}");
    }
    assert!(!help.contains("tiny"), "{help}");
    let refused = output(&["--only", "speed"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

#[test]
fn a_pagecast_that_is_not_there_is_an_error_at_once() {
    let refused = output(&["--tiny", "--pagecast", "/no/such/pagecast"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("/no/such/pagecast is not a file"),
        "{refused:?}"
    );
}

/// Its numbers would be held against it.
#[cfg(debug_assertions)]
#[test]
fn what_was_built_without_optimisation_measures_nothing() {
    let refused = output(&["--only", "zeros"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("without optimisation"), "{refused:?}");
}
