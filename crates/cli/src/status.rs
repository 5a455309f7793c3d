//! `pagecast status`: the daemon, its templates and its forks.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use comfy_table::Cell;
use indicatif::{BinaryBytes, HumanDuration};
use pagecast_client::{Backend, Fork, ForkState, Health, Template};
use serde::Serialize;

use crate::daemon::{DaemonArgs, DaemonError, EXIT_CODES, block_on};
use crate::facts::Facts;
use crate::template;
use pagecast_command::{Column, Output};

/// Show the daemon, its templates, and the number and memory of its forks by template, backend and state.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Status {
    /// Print JSON.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    daemon: DaemonArgs,
}

/// The data to print.
#[derive(Serialize)]
struct Shown {
    daemon: Health,
    templates: Vec<Template>,
    forks: Vec<Group>,
}

/// Forks with the same template, backend and state, and their memory in bytes.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Group {
    template: String,
    backend: Backend,
    state: ForkState,
    forks: u64,
    /// Number of forks that were measured. The fields below are their sums.
    measured: u64,
    pss: u64,
    private: u64,
    unshared: u64,
}

const COLUMNS: [Column; 7] = [
    Column::Text("forks of"),
    Column::Text("backend"),
    Column::Text("state"),
    Column::Number("forks"),
    Column::Number("memory"),
    Column::Number("private"),
    Column::Number("unshared"),
];

impl Status {
    /// Calls the daemon and prints its answers.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let client = self.daemon.client();
        let shown = block_on(async {
            Ok(Shown {
                daemon: client.health().await.map_err(DaemonError::from)?,
                templates: client.templates().await.map_err(DaemonError::from)?,
                forks: group(&client.forks(true).await.map_err(DaemonError::from)?),
            })
        })?;
        let output = Output::stdout();
        if self.json {
            output.print_json(&shown)?;
        } else {
            output.print(&shown.for_people(output))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Shown {
    fn for_people(&self, output: Output) -> String {
        let Health {
            status,
            version,
            pid,
            uptime_s,
            rss_bytes,
            ..
        } = &self.daemon;
        let mut facts = Facts::default();
        let uptime = HumanDuration(Duration::from_secs(*uptime_s));
        facts.add(
            "daemon",
            format!("{status}: pagecast {version}, pid {pid}, up {uptime}"),
        );
        if let Some(rss) = rss_bytes {
            let locked = |template: &Template| template.warmth.as_ref().map_or(0, |warmth| warmth.locked_bytes);
            facts.add(
                "memory",
                match self.templates.iter().map(locked).sum() {
                    0 => BinaryBytes(*rss).to_string(),
                    resident => format!(
                        "{}, {} of it resident templates",
                        BinaryBytes(*rss),
                        BinaryBytes(resident)
                    ),
                },
            );
        }
        let [pss, private, unshared] = [
            |group: &Group| group.pss,
            |group: &Group| group.private,
            |group: &Group| group.unshared,
        ]
        .map(|of| BinaryBytes(self.forks.iter().map(of).sum()));
        let forks: u64 = self.forks.iter().map(|group| group.forks).sum();
        let measured: u64 = self.forks.iter().map(|group| group.measured).sum();
        facts.add("forks", forks);
        if measured > 0 {
            facts.add(
                "fork memory",
                format!(
                    "{pss} PSS, {private} of it private; without sharing it would be {unshared} ({measured} of {forks} forks measured)"
                ),
            );
        }
        let mut text = facts.text();
        if self.templates.is_empty() {
            text += "\nno templates: add one with `pagecast template add`\n";
        } else {
            text += "\n";
            text += &output.table(&template::COLUMNS, self.templates.iter().map(template::row).collect());
        }
        if !self.forks.is_empty() {
            text += "\n";
            text += &output.table(&COLUMNS, self.forks.iter().map(Group::row).collect());
        }
        text
    }
}

impl Group {
    fn row(&self) -> Vec<Cell> {
        let bytes = |bytes| match self.measured {
            0 => "-".to_owned(),
            _ => BinaryBytes(bytes).to_string(),
        };
        vec![
            Cell::new(&self.template),
            Cell::new(self.backend),
            Cell::new(self.state),
            Cell::new(self.forks),
            Cell::new(bytes(self.pss)),
            Cell::new(bytes(self.private)),
            Cell::new(bytes(self.unshared)),
        ]
    }
}

fn group(forks: &[Fork]) -> Vec<Group> {
    let mut groups = BTreeMap::new();
    for fork in forks {
        let key = (&fork.template, fork.backend, fork.state);
        let group = groups.entry(key).or_insert_with(|| Group {
            template: fork.template.clone(),
            backend: fork.backend,
            state: fork.state,
            forks: 0,
            measured: 0,
            pss: 0,
            private: 0,
            unshared: 0,
        });
        group.forks += 1;
        if let Some(memory) = &fork.memory {
            group.measured += 1;
            group.pss += memory.pss;
            group.private += memory.private;
            group.unshared += memory.rss;
        }
    }
    groups.into_values().collect()
}
