//! Metrics, as Prometheus reads them: `docs/metrics.md` lists them.
//!
//! | file | holds |
//! | --- | --- |
//! | `process` | CPU time, memory and file descriptors of the daemon |
//! | `families` | the text format |
//!
//! Nothing is counted twice: a scrape reads the page server's own counters, and adds the saved counters of deleted
//! forks. It does not wait for disks or VMMs.

mod families;
mod process;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pagecast::server::LatencyHistogram;
use pagecast_client::{Backend, ForkState};

use self::families::{Families, NO_LABELS, number};
use crate::fork::Fork;
use crate::requests::Requests;
use crate::service::{BACKENDS, Reasons, Service, Snapshot, TemplateTotals, Totals};
use crate::template::{Template, TemplateName};
use pagecast_command::stderr;

/// The content type of [`text`].
pub(crate) const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Powers of two nanoseconds, which cut no bucket of the histograms in two: from 1 us each to 67 ms, then every second one
/// up to 69 s, beyond which faults are given up.
const BOUNDS: [u32; 22] = [
    10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 28, 30, 32, 34, 36,
];

/// Returns all metrics as text.
pub(crate) fn text(service: &Service, requests: &Requests) -> String {
    let Snapshot {
        templates,
        forks,
        mut totals,
    } = service.registry().snapshot();
    for template in &templates {
        totals.add_reads(&template.name, template.pages.slow_reads());
    }
    for fork in &forks {
        totals.add(fork);
    }

    let mut families = Families::default();
    daemon(&mut families, service);
    of_templates(&mut families, &templates);
    of_forks(&mut families, &templates, &forks);
    of_totals(&mut families, &totals);
    of_requests(&mut families, requests);
    process::collect(&mut families);
    families.text()
}

fn daemon(families: &mut Families, service: &Service) {
    families.gauge(
        "pagecast_build_info",
        "What runs; the value is always 1.",
        [([("version", env!("CARGO_PKG_VERSION"))], 1.0)],
    );
    families.gauge(
        "pagecast_uptime_seconds",
        "How long the daemon has run.",
        [(NO_LABELS, service.uptime().as_secs_f64())],
    );
    families.gauge(
        "pagecast_forks_max",
        "How many forks may wait or live at once.",
        [(NO_LABELS, number(service.max_forks() as u64))],
    );
    families.counter(
        "pagecast_log_lines_dropped_total",
        "Log lines that were dropped because nobody has read standard error in time.",
        [(NO_LABELS, number(stderr::dropped_lines()))],
    );
}

fn of_templates(families: &mut Families, templates: &[Arc<Template>]) {
    let changed = templates
        .iter()
        .filter(|template| template.validity.change().is_some())
        .count();
    families.gauge(
        "pagecast_templates",
        "Templates, by whether they can be forked.",
        [
            ([("state", "ready")], number((templates.len() - changed) as u64)),
            ([("state", "changed")], number(changed as u64)),
        ],
    );
    let of_each = |value: fn(&Template) -> u64| {
        templates
            .iter()
            .map(move |template| ([("template", template.name.as_str())], number(value(template))))
    };
    families.gauge(
        "pagecast_template_size_bytes",
        "The length of the memory file.",
        of_each(|template| template.pages.len().get()),
    );
    families.gauge(
        "pagecast_template_zero_bytes",
        "How much of the memory file is known to be zeros.",
        of_each(|template| template.pages.zeros().known_bytes().get()),
    );
    families.gauge(
        "pagecast_template_warm_bytes",
        "How much of it was brought into memory ahead of its forks, as last asked for.",
        of_each(|template| template.warmth().map_or(0, |told| told.read_bytes)),
    );
    families.gauge(
        "pagecast_template_huge_bytes",
        "How much of that came in pages of 2 MiB.",
        of_each(|template| template.warmth().map_or(0, |told| told.huge_bytes)),
    );
    families.gauge(
        "pagecast_template_locked_bytes",
        "How much of it is locked in memory now.",
        of_each(|template| template.warmth().map_or(0, |told| told.locked_bytes)),
    );
    working_sets(families, templates);
}

fn working_sets(families: &mut Families, templates: &[Arc<Template>]) {
    let learned: Vec<_> = templates
        .iter()
        .filter_map(|template| {
            let set = template.pages.working_set()?;
            Some((template.name.as_str(), set, template.pages.prefault_score()))
        })
        .collect();
    let label = |name| [("template", name)];
    families.gauge(
        "pagecast_working_set_bytes",
        "What forks touch first, as far as that was learned.",
        learned
            .iter()
            .map(|(name, set, _)| (label(*name), number(set.size().get()))),
    );
    families.gauge(
        "pagecast_working_set_recordings",
        "Recordings that the working set was learned from.",
        learned
            .iter()
            .map(|(name, set, _)| (label(*name), f64::from(set.recordings()))),
    );
    families.gauge(
        "pagecast_prefault_precision_ratio",
        "Which part of what forks were given ahead they have used.",
        learned
            .iter()
            .filter_map(|(name, _, score)| Some((label(*name), score.precision?))),
    );
    families.gauge(
        "pagecast_prefault_recall_ratio",
        "Which part of what forks have used they were given ahead.",
        learned
            .iter()
            .filter_map(|(name, _, score)| Some((label(*name), score.recall?))),
    );
    families.gauge(
        "pagecast_prefault_switched_off",
        "Whether forks are not given the working set ahead, because they use too little of it.",
        learned
            .iter()
            .map(|(name, _, score)| (label(*name), f64::from(u8::from(score.switched_off)))),
    );
}

fn of_forks(families: &mut Families, templates: &[Arc<Template>], forks: &[Arc<Fork>]) {
    let mut counts: BTreeMap<(&TemplateName, Backend, ForkState), u64> = BTreeMap::new();
    for template in templates {
        for backend in BACKENDS {
            for state in ForkState::ALL {
                counts.insert((&template.name, backend, state), 0);
            }
        }
    }
    for fork in forks {
        *counts
            .entry((&fork.template.name, fork.backend(), fork.state()))
            .or_default() += 1;
    }
    families.gauge(
        "pagecast_forks",
        "Forks that wait, live or are remembered.",
        counts.iter().map(|((template, backend, state), count)| {
            let labels = [
                ("template", template.to_string()),
                ("backend", backend.to_string()),
                ("state", state.to_string()),
            ];
            (labels, number(*count))
        }),
    );
}

fn of_totals(families: &mut Families, totals: &Totals) {
    lives(families, totals);
    reasons(
        families,
        totals,
        "pagecast_failures_total",
        "Forks that have failed, for whatever reason.",
        |of_template| &of_template.failures,
    );
    reasons(
        families,
        totals,
        "pagecast_refusals_total",
        "Connections that were refused: their handshake was never finished.",
        |of_template| &of_template.refusals,
    );
    reasons(
        families,
        totals,
        "pagecast_kills_total",
        "VMMs that were killed rather than left to hang or to read a wrong byte.",
        |of_template| &of_template.kills,
    );

    families.counter(
        "pagecast_faults_total",
        "Page faults and what else happened to pages; kinds overlap.",
        totals.iter().flat_map(|(template, of_template)| {
            of_template
                .faults_by_kind()
                .map(|(kind, count)| ([("template", template.as_str()), ("kind", kind)], number(count)))
        }),
    );
    latency(
        families,
        totals,
        "pagecast_fault_latency_seconds",
        "From reading a fault to its page being in place.",
        |of_template| &of_template.fault_latency,
    );
    latency(
        families,
        totals,
        "pagecast_install_latency_seconds",
        "What the kernel took for putting in place a page that a vCPU waited for.",
        |of_template| &of_template.install_latency,
    );
    of_each(
        families,
        totals,
        "pagecast_installed_bytes_total",
        "Bytes of the template copied into forks.",
        |of_template| number(of_template.installed_bytes),
    );
    of_each(
        families,
        totals,
        "pagecast_given_back_bytes_total",
        "Bytes of zeros that the kernel fills in by itself.",
        |of_template| number(of_template.given_back_bytes),
    );
    families.counter(
        "pagecast_prefault_faults_total",
        "First faults of forks that were given their working set ahead, by how well they were foreseen.",
        totals.iter().flat_map(|(template, of_template)| {
            of_template
                .prefault_by_kind()
                .map(|(kind, count)| ([("template", template.as_str()), ("kind", kind)], number(count)))
        }),
    );
    of_each(
        families,
        totals,
        "pagecast_template_reads_total",
        "Reads of the memory file that could block, away from the fault path.",
        |of_template| number(of_template.reads.reads),
    );
    of_each(
        families,
        totals,
        "pagecast_template_read_failures_total",
        "Those of them that failed.",
        |of_template| number(of_template.reads.failed),
    );
    of_each(
        families,
        totals,
        "pagecast_template_read_bytes_total",
        "Bytes that the others gave.",
        |of_template| number(of_template.reads.bytes),
    );
    of_each(
        families,
        totals,
        "pagecast_template_read_seconds_total",
        "What all of them took together; several are under way at once.",
        |of_template| of_template.reads.time.as_secs_f64(),
    );
}

fn lives(families: &mut Families, totals: &Totals) {
    families.counter(
        "pagecast_forks_created_total",
        "Forks made, or found again at the start.",
        totals.iter().flat_map(|(template, of_template)| {
            BACKENDS.map(|backend| {
                let labels = [("template", template.to_string()), ("backend", backend.to_string())];
                (labels, number(of_template.created(backend)))
            })
        }),
    );
    families.counter(
        "pagecast_forks_ended_total",
        "Forks that have ended, by how, or were deleted while they waited.",
        totals.iter().flat_map(|(template, of_template)| {
            of_template.ended().map(move |(backend, state, count)| {
                let labels = [
                    ("template", template.to_string()),
                    ("backend", backend.to_string()),
                    ("state", state.to_string()),
                ];
                (labels, number(count))
            })
        }),
    );
}

fn reasons(
    families: &mut Families,
    totals: &Totals,
    name: &str,
    help: &str,
    counts: impl Fn(&TemplateTotals) -> &Reasons,
) {
    let samples = totals.iter().flat_map(|(template, of_template)| {
        counts(of_template).iter().map(move |((backend, reason), count)| {
            let labels = [
                ("template", template.to_string()),
                ("backend", backend.to_string()),
                ("reason", reason.clone()),
            ];
            (labels, number(*count))
        })
    });
    families.counter(name, help, samples);
}

fn latency(
    families: &mut Families,
    totals: &Totals,
    name: &str,
    help: &str,
    histogram: impl Fn(&TemplateTotals) -> &LatencyHistogram,
) {
    let bounds = BOUNDS.map(|power| Duration::from_nanos(1 << power));
    let samples = totals
        .iter()
        .map(|(template, of_template)| ([("template", template.as_str())], histogram(of_template)));
    families.histogram(name, help, &bounds, samples);
}

fn of_each(families: &mut Families, totals: &Totals, name: &str, help: &str, value: impl Fn(&TemplateTotals) -> f64) {
    let samples = totals
        .iter()
        .map(|(template, of_template)| ([("template", template.as_str())], value(of_template)));
    families.counter(name, help, samples);
}

fn of_requests(families: &mut Families, requests: &Requests) {
    let counts = requests.counts();
    families.counter(
        "pagecast_http_requests_total",
        "Requests of the control API and for metrics that were answered.",
        counts.iter().map(|(answered, count)| {
            let labels = [
                ("method", answered.method.to_owned()),
                ("path", answered.path.clone()),
                ("status", answered.status.to_string()),
            ];
            (labels, number(*count))
        }),
    );
}
