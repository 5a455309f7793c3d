//! Results of probes.

use std::fmt::Write as _;

use console::Style;
use serde::Serialize;

use pagecast_command::{Output, harmless};

/// The status of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// No problem.
    Ok,
    /// Forks can be served, but something optional is missing or weaker than it could be.
    Warn,
    /// Forks cannot be served like this.
    Fail,
}

/// One line of the result. It has a fix unless its status is ok.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    check: &'static str,
    status: Status,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "nothing is ok there"))]
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Ok,
            found: found.into(),
            fix: None,
        }
    }

    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "there is nothing to examine"))]
    pub(super) fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Warn,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    pub(super) fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Fail,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// The parts that tests compare.
    #[cfg(test)]
    pub(super) fn parts(&self) -> (Status, &str, &str) {
        (self.status, &self.found, self.fix.as_deref().unwrap_or_default())
    }
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Ok => Style::new().green(),
            Self::Warn => Style::new().yellow(),
            Self::Fail => Style::new().red().bold(),
        }
    }
}

/// The findings, one a line, each fix on the line below, and a summary.
pub(super) fn for_people(findings: &[Finding], output: Output) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let word = output.styled(&finding.status.style(), &format!("{:<4}", finding.status.word()));
        let found = harmless(&finding.found);
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{word}  {:<width$}  {found}", finding.check);
        if let Some(fix) = &finding.fix {
            let _ = writeln!(text, "      {:<width$}  fix: {}", "", harmless(fix));
        }
    }
    text + "\n" + &summary(findings, output) + "\n"
}

fn summary(findings: &[Finding], output: Output) -> String {
    let count = |status| findings.iter().filter(|finding| finding.status == status).count();
    let (warned, failed) = (count(Status::Warn), count(Status::Fail));
    let counts = format!("{} ok, {warned} warn, {failed} fail", count(Status::Ok));
    let (status, verdict) = match (failed, warned) {
        (0, 0) => (Status::Ok, "this host can serve forks"),
        (0, _) => (
            Status::Warn,
            "this host can serve forks; see whether the warnings matter to you",
        ),
        _ => (
            Status::Fail,
            "this host cannot serve forks until the failures are fixed",
        ),
    };
    format!("{counts}: {}", output.styled(&status.style(), verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Vec<Finding> {
        vec![
            Finding::ok("kernel", "Linux 6.18"),
            Finding::warn("hugepages", "none \u{1b}[2J free", "make some"),
            Finding::fail("kvm", "missing", "load it"),
        ]
    }

    // Under a test runner there is no terminal, hence no colours.
    fn shown(findings: &[Finding]) -> String {
        console::set_colors_enabled(false);
        for_people(findings, Output::stdout())
    }

    #[test]
    fn lines_are_aligned_and_fixes_stand_below() {
        assert_eq!(
            shown(&findings()),
            "\
ok    kernel     Linux 6.18
warn  hugepages  none \\u{1b}[2J free
                 fix: make some
fail  kvm        missing
                 fix: load it

1 ok, 1 warn, 1 fail: this host cannot serve forks until the failures are fixed
"
        );
    }

    #[test]
    fn the_last_line_tells_warnings_from_nothing_to_say() {
        let all = findings();
        assert!(shown(&all[..2]).ends_with("see whether the warnings matter to you\n"));
        assert!(shown(&all[..1]).ends_with("1 ok, 0 warn, 0 fail: this host can serve forks\n"));
    }

    #[test]
    fn json_has_a_fix_only_where_there_is_one() {
        assert_eq!(
            serde_json::to_value(findings()).unwrap(),
            serde_json::json!([
                {"check": "kernel", "status": "ok", "found": "Linux 6.18"},
                {"check": "hugepages", "status": "warn", "found": "none \u{1b}[2J free", "fix": "make some"},
                {"check": "kvm", "status": "fail", "found": "missing", "fix": "load it"},
            ])
        );
    }
}
