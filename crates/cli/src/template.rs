//! `pagecast template`: the templates of the daemon.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use comfy_table::{Cell, Color};
use indicatif::BinaryBytes;
use pagecast_client::template::{Guard, Protection, TemplateMemory, TemplateState};
use pagecast_client::{AddTemplate, Template};

use crate::argument;
use crate::daemon::{DaemonArgs, DaemonError, EXIT_CODES, block_on};
use crate::facts::Facts;
use crate::run::{Train, describe_working_set};
use pagecast_command::{Column, Output, harmless};

mod warm;

use warm::Warm;

/// Add, show, warm, train and remove templates: snapshots to fork from.
#[derive(Args)]
pub(crate) struct TemplateArgs {
    #[command(subcommand)]
    command: TemplateCommand,

    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,

    #[command(flatten)]
    daemon: DaemonArgs,
}

#[derive(Subcommand)]
enum TemplateCommand {
    Add(Add),
    Ls(List),
    Show(Show),
    Warm(Warm),
    Rm(Remove),
    Train(Train),
}

/// Add a template. Succeeds if the same template exists.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct Add {
    /// The template's name: lower-case letters, digits, `.`, `_` and `-`.
    name: String,

    /// The memory file of the snapshot.
    #[arg(long, value_name = "PATH")]
    mem_file: PathBuf,

    /// The state file of the snapshot, for the tools that restore it.
    #[arg(long, value_name = "PATH")]
    vmstate: Option<PathBuf>,

    /// Page size of the guests [default: the one in the state file, else 4K]
    #[arg(long, value_parser = argument::page_size())]
    page_size: Option<u64>,

    /// Protection of the memory file against writes, until the template is removed [default: set in the daemon's
    /// configuration]
    #[arg(long, value_parser = protection())]
    protect: Option<Protection>,
}

/// List all templates.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct List {}

/// Show one template.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct Show {
    /// Name of the template.
    name: String,
}

/// Remove a template that has no forks. Its files stay.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct Remove {
    /// Name of the template.
    name: String,
}

pub(crate) const COLUMNS: [Column; 9] = [
    Column::Text("template"),
    Column::Text("state"),
    Column::Number("size"),
    Column::Number("zeros"),
    Column::Number("resident"),
    Column::Number("forks"),
    Column::Number("memory"),
    Column::Number("unshared"),
    Column::Text("mem-file"),
];

impl TemplateArgs {
    /// Calls the daemon and prints its answer.
    pub(crate) fn run(self) -> Result<ExitCode> {
        block_on(self.call())
    }

    async fn call(self) -> Result<ExitCode> {
        let client = self.daemon.client();
        let output = Output::stdout();
        match self.command {
            TemplateCommand::Add(add) => {
                let (name, template) = (add.name.clone(), add.into_template()?);
                let template = client.add_template(&name, &template).await.map_err(DaemonError::from)?;
                self::show(&template, self.json, output)?;
            }
            TemplateCommand::Ls(List {}) => {
                let templates = client.templates().await.map_err(DaemonError::from)?;
                if self.json {
                    output.print_json(&templates)?;
                } else {
                    output.print(&output.table(&COLUMNS, templates.iter().map(row).collect()))?;
                }
            }
            TemplateCommand::Show(Show { name }) => {
                let template = client.template(&name).await.map_err(DaemonError::from)?;
                self::show(&template, self.json, output)?;
            }
            TemplateCommand::Warm(warm) => warm.call(&client, self.json, output).await?,
            TemplateCommand::Rm(Remove { name }) => {
                client.remove_template(&name).await.map_err(DaemonError::from)?;
            }
            TemplateCommand::Train(train) => return train.call(client, self.json).await,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Add {
    fn into_template(self) -> Result<AddTemplate> {
        Ok(AddTemplate {
            mem_path: absolute(&self.mem_file)?,
            vmstate_path: self.vmstate.as_deref().map(absolute).transpose()?,
            page_size: self.page_size,
            protect: self.protect,
        })
    }
}

fn protection() -> impl TypedValueParser<Value = Protection> {
    PossibleValuesParser::new(["none", "readonly", "immutable"]).map(|name| match name.as_str() {
        "readonly" => Protection::Readonly,
        "immutable" => Protection::Immutable,
        _ => Protection::None,
    })
}

/// Makes a path absolute, since the daemon has another current folder.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot make {} absolute", path.display()))
}

/// The template as a row of a table with [`COLUMNS`].
pub(crate) fn row(template: &Template) -> Vec<Cell> {
    let (state, colour) = match template.state {
        TemplateState::Ready => ("ready", Color::Green),
        TemplateState::Changed => ("changed", Color::Red),
    };
    let memory = |of: fn(&TemplateMemory) -> u64| match &template.memory {
        Some(memory) => BinaryBytes(of(memory)).to_string(),
        None => "-".to_owned(),
    };
    let resident = match &template.warmth {
        Some(warmth) if warmth.resident => BinaryBytes(warmth.locked_bytes).to_string(),
        _ => "-".to_owned(),
    };
    vec![
        Cell::new(&template.name),
        Cell::new(state).fg(colour),
        Cell::new(BinaryBytes(template.size_bytes)),
        Cell::new(BinaryBytes(template.zero_bytes)),
        Cell::new(resident),
        Cell::new(template.forks),
        Cell::new(memory(|memory| memory.pss)),
        Cell::new(memory(|memory| memory.unshared)),
        Cell::new(match &template.mem_path {
            Some(path) => harmless(&path.to_string_lossy()),
            None => "-".to_owned(),
        }),
    ]
}

pub(crate) fn show(template: &Template, json: bool, output: Output) -> Result<()> {
    if json {
        return output.print_json(template);
    }
    let mut facts = Facts::default();
    facts.add("template", &template.name);
    facts.add(
        "state",
        match (template.state, &template.changed) {
            (TemplateState::Ready, _) => "ready".to_owned(),
            (TemplateState::Changed, Some(how)) => format!("changed: {how}"),
            (TemplateState::Changed, None) => "changed".to_owned(),
        },
    );
    for warning in &template.warnings {
        facts.add("warning", harmless(warning));
    }
    if let Some(path) = &template.mem_path {
        facts.add("mem-file", path.display());
    }
    if let Some(vmstate) = &template.vmstate_path {
        facts.add("vmstate", vmstate.display());
    }
    facts.add(
        "size",
        format!(
            "{}, {} of it known to be zeros",
            BinaryBytes(template.size_bytes),
            BinaryBytes(template.zero_bytes)
        ),
    );
    facts.add("page size", BinaryBytes(template.page_size));
    let guard = match template.guard {
        Guard::Lease => "writers wait until its forks have ended",
        Guard::Watch => "changes are noticed after the write",
    };
    let protection = match template.protect {
        Protection::None => "not protected",
        Protection::Readonly => "read-only",
        Protection::Immutable => "immutable",
    };
    facts.add("guard", format!("{protection}; {guard}"));
    if let Some(warmth) = &template.warmth {
        facts.add("in memory", warm::describe(warmth));
    }
    facts.add("forks", template.forks);
    if let Some(set) = &template.working_set {
        facts.add("working set", describe_working_set(set));
    }
    if let Some(memory) = &template.memory {
        facts.add(
            "memory",
            format!(
                "{} PSS, {} of it private; without sharing it would be {} ({} of {} forks measured)",
                BinaryBytes(memory.pss),
                BinaryBytes(memory.private),
                BinaryBytes(memory.unshared),
                memory.measured,
                template.forks
            ),
        );
    }
    output.print(&facts.text())
}
