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

/// Exponents of the bucket bounds: powers of two nanoseconds, which split no bucket of the histograms. All from 1 us to
/// 67 ms, then every second one up to 69 s, longer than any fault may wait.
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
        "Version of the daemon; the value is always 1.",
        [([("version", env!("CARGO_PKG_VERSION"))], 1.0)],
    );
    families.gauge(
        "pagecast_uptime_seconds",
        "Time since the start of the daemon.",
        [(NO_LABELS, service.uptime().as_secs_f64())],
    );
    families.gauge(
        "pagecast_forks_max",
        "Most forks that may wait or live at once.",
        [(NO_LABELS, number(service.max_forks() as u64))],
    );
    families.counter(
        "pagecast_log_lines_dropped_total",
        "Log lines dropped because standard error was not read in time.",
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
        "Templates that can be forked, or have changed and cannot.",
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
        "Length of the memory file.",
        of_each(|template| template.pages.len().get()),
    );
    families.gauge(
        "pagecast_template_zero_bytes",
        "Bytes of the memory file that are known to be zeros.",
        of_each(|template| template.pages.zeros().known_bytes().get()),
    );
    families.gauge(
        "pagecast_template_warm_bytes",
        "Bytes read into memory by the last request to warm the template.",
        of_each(|template| template.warmth().map_or(0, |progress| progress.read_bytes)),
    );
    families.gauge(
        "pagecast_template_huge_bytes",
        "Bytes read into memory by that request in pages of 2 MiB.",
        of_each(|template| template.warmth().map_or(0, |progress| progress.huge_bytes)),
    );
    families.gauge(
        "pagecast_template_locked_bytes",
        "Bytes of the template locked in memory now.",
        of_each(|template| template.warmth().map_or(0, |progress| progress.locked_bytes)),
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
        "Size of the working set.",
        learned
            .iter()
            .map(|(name, set, _)| (label(*name), number(set.size().get()))),
    );
    families.gauge(
        "pagecast_working_set_recordings",
        "Number of recordings in the working set.",
        learned
            .iter()
            .map(|(name, set, _)| (label(*name), f64::from(set.recordings()))),
    );
    families.gauge(
        "pagecast_prefault_precision_ratio",
        "Part of the prefaulted pages that forks have used.",
        learned
            .iter()
            .filter_map(|(name, _, score)| Some((label(*name), score.precision?))),
    );
    families.gauge(
        "pagecast_prefault_recall_ratio",
        "Part of the pages used by forks that were prefaulted.",
        learned
            .iter()
            .filter_map(|(name, _, score)| Some((label(*name), score.recall?))),
    );
    families.gauge(
        "pagecast_prefault_switched_off",
        "1 if the working set is not prefaulted, because forks use too little of it.",
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
        "Forks that wait or live, and ended ones that are not yet forgotten.",
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
        "Forks that have failed, by reason.",
        |of_template| &of_template.failures,
    );
    reasons(
        families,
        totals,
        "pagecast_refusals_total",
        "Refused connections: their handshake did not succeed.",
        |of_template| &of_template.refusals,
    );
    reasons(
        families,
        totals,
        "pagecast_kills_total",
        "VMMs killed so that they neither hang nor read a wrong byte.",
        |of_template| &of_template.kills,
    );

    families.counter(
        "pagecast_faults_total",
        "Page faults and other events of pages; kinds overlap.",
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
        "Time from reading a fault to the installation of its page.",
        |of_template| &of_template.fault_latency,
    );
    latency(
        families,
        totals,
        "pagecast_install_latency_seconds",
        "Time that the kernel took to install pages for demand faults.",
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
        "Bytes of zeros that the kernel fills in without a fault for the daemon.",
        |of_template| number(of_template.given_back_bytes),
    );
    families.counter(
        "pagecast_prefault_faults_total",
        "First faults of forks with a prefaulted working set, by kind.",
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
        "Reads of the memory file that failed.",
        |of_template| number(of_template.reads.failed),
    );
    of_each(
        families,
        totals,
        "pagecast_template_read_bytes_total",
        "Bytes that successful reads of the memory file returned.",
        |of_template| number(of_template.reads.bytes),
    );
    of_each(
        families,
        totals,
        "pagecast_template_read_seconds_total",
        "Total time of all reads of the memory file; several may run at once.",
        |of_template| of_template.reads.time.as_secs_f64(),
    );
}

fn lives(families: &mut Families, totals: &Totals) {
    families.counter(
        "pagecast_forks_created_total",
        "Forks created, and forks taken up from an earlier daemon.",
        totals.iter().flat_map(|(template, of_template)| {
            BACKENDS.map(|backend| {
                let labels = [("template", template.to_string()), ("backend", backend.to_string())];
                (labels, number(of_template.created(backend)))
            })
        }),
    );
    families.counter(
        "pagecast_forks_ended_total",
        "Forks that have ended, by state, or were deleted before their end was seen.",
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
        "Answered requests of the control API and for metrics.",
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
