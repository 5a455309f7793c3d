//! Allowed dependencies between crates, and explanations of all others.

use std::fs;

use anyhow::{Context as _, Result};
use cargo_metadata::{DependencyKind, Metadata};

use crate::cargo::workspace_root;

/// The crates that each crate of the workspace may depend on. Arrows point one way: see `docs/architecture.md`.
const MAY_USE: [(&str, &[&str]); 11] = [
    ("pagecast-uffd", &[]),
    ("pagecast", &["pagecast-uffd"]),
    ("pagecast-client", &[]),
    (
        "pagecast-daemon",
        &["pagecast", "pagecast-client", "pagecast-command", "pagecast-uffd"],
    ),
    (
        "pagecast-cli",
        &[
            "pagecast-uffd",
            "pagecast",
            "pagecast-client",
            "pagecast-daemon",
            "pagecast-command",
            "pagecast-firecracker",
        ],
    ),
    ("pagecast-command", &[]),
    ("pagecast-firecracker", &["pagecast-client", "pagecast-command"]),
    // It calls a daemon, but contains none.
    (
        "pagecast-bench",
        &[
            "pagecast-uffd",
            "pagecast",
            "pagecast-client",
            "pagecast-command",
            "pagecast-testkit",
        ],
    ),
    (
        "pagecast-testkit",
        &["pagecast-uffd", "pagecast", "pagecast-client", "pagecast-firecracker"],
    ),
    (
        "pagecast-fuzz",
        &["pagecast-uffd", "pagecast", "pagecast-client", "pagecast-daemon"],
    ),
    (
        "xtask",
        &[
            "pagecast-uffd",
            "pagecast",
            "pagecast-client",
            "pagecast-daemon",
            "pagecast-command",
            "pagecast-bench",
            "pagecast-testkit",
            "pagecast-fuzz",
        ],
    ),
];
/// Crates that the tests and benches of each may use, too.
const TESTKIT: &str = "pagecast-testkit";
/// The page with a line for each dependency.
const EXPLANATIONS: &str = "docs/dependencies.md";

/// `from` depends on `to`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Arrow {
    from: String,
    to: String,
    kind: DependencyKind,
}

/// Returns the forbidden dependencies between crates of the workspace, one a line.
pub(super) fn wrong_arrows(workspace: &Metadata) -> Vec<String> {
    let members: Vec<String> = workspace
        .workspace_packages()
        .iter()
        .map(|package| package.name.to_string())
        .collect();
    let inside: Vec<Arrow> = arrows(workspace)
        .into_iter()
        .filter(|arrow| members.contains(&arrow.to))
        .collect();
    wrong(&members, &inside)
}

/// Returns the dependencies of the workspace without an explanation, one a line.
pub(super) fn unexplained_dependencies(workspace: &Metadata) -> Result<Vec<String>> {
    let path = workspace_root().join(EXPLANATIONS);
    let explanations = fs::read_to_string(path).with_context(|| format!("failed to read {EXPLANATIONS}"))?;
    let members = workspace.workspace_packages();
    let outside: Vec<Arrow> = arrows(workspace)
        .into_iter()
        .filter(|arrow| members.iter().all(|package| *package.name != arrow.to))
        .collect();
    Ok(unexplained(&outside, &explanations))
}

fn arrows(workspace: &Metadata) -> Vec<Arrow> {
    let mut arrows = Vec::new();
    for package in workspace.workspace_packages() {
        arrows.extend(package.dependencies.iter().map(|dependency| Arrow {
            from: package.name.to_string(),
            to: dependency.name.clone(),
            kind: dependency.kind,
        }));
    }
    arrows
}

fn wrong(members: &[String], inside: &[Arrow]) -> Vec<String> {
    let may_use = |from: &str| MAY_USE.iter().find(|(name, _)| *name == from).map(|(_, used)| *used);
    let unknown = members
        .iter()
        .filter(|name| may_use(name).is_none())
        .map(|name| format!("the allowed dependencies of {name} are missing in {}", file!()));
    let misdirected = inside
        .iter()
        .filter(|arrow| {
            let tests_use_testkit = arrow.kind == DependencyKind::Development && arrow.to == TESTKIT;
            !tests_use_testkit && may_use(&arrow.from).is_some_and(|used| !used.contains(&arrow.to.as_str()))
        })
        .map(|arrow| format!("{} must not depend on {}", arrow.from, arrow.to));
    unknown.chain(misdirected).collect()
}

fn unexplained(outside: &[Arrow], explanations: &str) -> Vec<String> {
    outside
        .iter()
        .filter(|arrow| arrow.kind == DependencyKind::Normal)
        .filter(|arrow| !explanations.contains(&format!("`{}`", arrow.to)))
        .map(|arrow| format!("{EXPLANATIONS} does not explain why {} uses `{}`", arrow.from, arrow.to))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrow(from: &str, to: &str, kind: DependencyKind) -> Arrow {
        Arrow {
            from: from.to_owned(),
            to: to.to_owned(),
            kind,
        }
    }

    #[test]
    fn arrows_of_the_design_are_fine() {
        let inside = [
            arrow("pagecast", "pagecast-uffd", DependencyKind::Normal),
            arrow("pagecast-cli", "pagecast", DependencyKind::Normal),
            arrow("pagecast", "pagecast-testkit", DependencyKind::Development),
            arrow("pagecast-cli", "pagecast-command", DependencyKind::Normal),
            arrow("pagecast-bench", "pagecast-testkit", DependencyKind::Normal),
            arrow("xtask", "pagecast-testkit", DependencyKind::Normal),
        ];
        assert!(wrong(&["pagecast".to_owned()], &inside).is_empty());
    }

    #[test]
    fn arrows_that_point_back_are_told() {
        for (from, to, kind) in [
            ("pagecast-uffd", "pagecast", DependencyKind::Normal),
            ("pagecast-uffd", "pagecast", DependencyKind::Development),
            ("pagecast", "pagecast-cli", DependencyKind::Build),
            ("pagecast", "pagecast-testkit", DependencyKind::Normal),
            ("pagecast-cli", "pagecast-testkit", DependencyKind::Normal),
            ("pagecast-cli", "pagecast-bench", DependencyKind::Normal),
            ("pagecast-bench", "pagecast-daemon", DependencyKind::Normal),
            ("pagecast-testkit", "xtask", DependencyKind::Normal),
        ] {
            let problems = wrong(&[], &[arrow(from, to, kind)]);
            assert_eq!(problems, [format!("{from} must not depend on {to}")]);
        }
    }

    #[test]
    fn a_crate_that_nothing_is_said_about_is_told() {
        let problems = wrong(&["pagecast-store".to_owned()], &[]);
        assert!(problems[0].contains("pagecast-store"), "{problems:?}");
    }

    #[test]
    fn a_dependency_is_explained_by_its_whole_name() {
        let outside = [
            arrow("pagecast", "serde", DependencyKind::Normal),
            arrow("pagecast", "rustix", DependencyKind::Normal),
            arrow("pagecast", "proptest", DependencyKind::Development),
        ];
        let problems = unexplained(&outside, "| `serde_json` | … |\n| `rustix` | … |");
        assert_eq!(
            problems,
            ["docs/dependencies.md does not explain why pagecast uses `serde`"]
        );
    }
}
