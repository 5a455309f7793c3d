//! `pagecast fork`: the forks of the daemon.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use comfy_table::{Cell, Color};
use indicatif::BinaryBytes;
use pagecast_client::fork::{ForkMemory, ForkPrefault};
use pagecast_client::{Backend, Client, CreateFork, Fork, ForkState, Prefault};

use crate::argument;
use crate::daemon::{DaemonArgs, DaemonError, EXIT_CODES, block_on};
use crate::facts::Facts;
use crate::template::absolute;
use pagecast_command::progress::Progress;
use pagecast_command::{Column, Output, harmless};

/// Create, show, complete and remove forks: microVMs restored from a template.
#[derive(Args)]
pub(crate) struct ForkArgs {
    #[command(subcommand)]
    command: ForkCommand,

    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,

    #[command(flatten)]
    daemon: DaemonArgs,
}

#[derive(Subcommand)]
enum ForkCommand {
    Create(Create),
    Ls(List),
    Show(Show),
    Rm(Remove),
    Complete(Complete),
}

/// Create a fork and print the `mem_backend` object for Firecracker's PUT /snapshot/load.
///
/// Stdout gets nothing else. The fork's ID and the reason for its backend go to stderr if that is a terminal, or with
/// --verbose. With --json, the daemon's whole answer is printed instead.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct Create {
    /// Name of the template.
    #[arg(long, value_name = "NAME")]
    template: String,

    /// ID of the fork [default: chosen by the daemon]
    #[arg(long)]
    id: Option<String>,

    /// Backend for the fork's memory [default: chosen by the daemon]
    #[arg(long, value_parser = argument::backend())]
    backend: Option<Backend>,

    /// Path of the fork's socket; only with uffd.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// Path at which to place the memory file, for a VMM in a jail; only with file.
    #[arg(long, value_name = "PATH")]
    path: Option<PathBuf>,

    /// User ID of the VMM, which owns the socket; only with uffd [default: the daemon's]
    #[arg(long)]
    uid: Option<u32>,

    /// Group ID of the socket; only with uffd.
    #[arg(long)]
    gid: Option<u32>,

    /// Pages to install before the fork asks for them [default: the working set, if one is known]
    #[arg(long, value_parser = argument::prefault())]
    prefault: Option<Prefault>,

    /// Record the pages that the fork touches first, for the template's working set; only with uffd, and without
    /// prefault.
    #[arg(long, conflicts_with = "prefault")]
    record: bool,

    /// The page size of the guest [default: the template's]
    #[arg(long, value_parser = argument::page_size())]
    page_size: Option<u64>,

    /// Process ID of the VMM; for file, as that VMM does not connect.
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,

    /// Print the fork's ID and the reason for its backend on stderr.
    #[arg(short, long)]
    verbose: bool,
}

/// List all forks.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct List {}

/// Show one fork.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct Show {
    /// ID of the fork.
    id: String,
}

/// Forget a fork that has ended or is complete.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
struct Remove {
    /// ID of the fork.
    id: String,

    /// Kill the VMM first, if it is alive.
    #[arg(long)]
    kill: bool,
}

/// Begin to complete a fork: install the rest of its memory, so that it no longer needs the daemon.
#[derive(Args)]
#[command(after_help = concat!("\
Exit codes:
  0  begun; with --wait: complete
  1  failed
  2  wrong usage
  3  the daemon cannot be reached
  4  the daemon refused; the message ends with the error code
  5  with --wait: the fork has exited or failed, or cannot be completed now"))]
struct Complete {
    /// ID of the fork.
    id: String,

    /// Wait until the fork is complete, and show it.
    #[arg(long)]
    wait: bool,
}

/// Exit code if the fork does not become complete.
const NOT_COMPLETED: u8 = 5;

/// Time between two looks at the fork's state.
const PACE: Duration = Duration::from_millis(50);

const COLUMNS: [Column; 9] = [
    Column::Text("fork"),
    Column::Text("template"),
    Column::Text("backend"),
    Column::Text("state"),
    Column::Number("pid"),
    Column::Number("faults"),
    Column::Number("rss"),
    Column::Number("pss"),
    Column::Number("private"),
];

impl ForkArgs {
    /// Calls the daemon and prints its answer.
    pub(crate) fn run(self) -> Result<ExitCode> {
        block_on(self.call())
    }

    async fn call(self) -> Result<ExitCode> {
        let client = self.daemon.client();
        let output = Output::stdout();
        match self.command {
            ForkCommand::Create(create) => create.call(&client, self.json, output).await?,
            ForkCommand::Ls(List {}) => {
                let forks = client.forks(true).await.map_err(DaemonError::from)?;
                if self.json {
                    output.print_json(&forks)?;
                } else {
                    output.print(&output.table(&COLUMNS, forks.iter().map(row).collect()))?;
                }
            }
            ForkCommand::Show(Show { id }) => {
                let fork = client.fork(&id).await.map_err(DaemonError::from)?;
                show(&fork, self.json, output)?;
            }
            ForkCommand::Rm(Remove { id, kill }) => {
                client.remove_fork(&id, kill).await.map_err(DaemonError::from)?;
            }
            ForkCommand::Complete(complete) => return complete.call(&client, self.json, output).await,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Create {
    async fn call(self, client: &Client, json: bool, output: Output) -> Result<()> {
        let verbose = self.verbose || std::io::stderr().is_terminal();
        let wanted = CreateFork {
            template: self.template,
            id: self.id,
            backend: self.backend,
            socket_path: self.socket_path.as_deref().map(absolute).transpose()?,
            path: self.path.as_deref().map(absolute).transpose()?,
            uid: self.uid,
            gid: self.gid,
            prefault: self.prefault,
            record: self.record,
            page_size: self.page_size,
            pid: self.pid,
        };
        let created = client.create_fork(&wanted).await.map_err(DaemonError::from)?;
        if json {
            return output.print_json(&created);
        }
        if verbose {
            let (id, backend, reason) = (&created.id, created.backend, harmless(&created.reason));
            let _ = writeln!(std::io::stderr(), "pagecast: {id}: {backend}: {reason}");
        }
        output.print_json(&created.mem_backend)
    }
}

impl Complete {
    async fn call(self, client: &Client, json: bool, output: Output) -> Result<ExitCode> {
        client.complete_fork(&self.id).await.map_err(DaemonError::from)?;
        if !self.wait {
            return Ok(ExitCode::SUCCESS);
        }
        let fork = {
            let _spinner = Progress::spinner(format!("completing {}", self.id));
            self.ended(client).await?
        };
        show(&fork, json, output)?;
        Ok(if fork.state == ForkState::Complete {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(NOT_COMPLETED)
        })
    }

    /// Waits until the fork is complete, has ended, or cannot be completed.
    async fn ended(&self, client: &Client) -> Result<Fork, DaemonError> {
        loop {
            let fork = client.fork(&self.id).await?;
            // A living fork with an error could not be completed, and is still served.
            if fork.state.is_end() || fork.error.is_some() {
                return Ok(fork);
            }
            tokio::time::sleep(PACE).await;
        }
    }
}

/// The fork as a row of a table with [`COLUMNS`].
fn row(fork: &Fork) -> Vec<Cell> {
    let colour = match fork.state {
        ForkState::Serving | ForkState::Complete => Color::Green,
        ForkState::Waiting | ForkState::Exited => Color::Yellow,
        ForkState::Failed => Color::Red,
    };
    let memory = |of: fn(&ForkMemory) -> u64| match &fork.memory {
        Some(memory) => BinaryBytes(of(memory)).to_string(),
        None => "-".to_owned(),
    };
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    vec![
        Cell::new(&fork.id),
        Cell::new(&fork.template),
        Cell::new(fork.backend),
        Cell::new(fork.state).fg(colour),
        Cell::new(fork.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
        Cell::new(number(fork.faults.map(|faults| faults.demand))),
        Cell::new(memory(|memory| memory.rss)),
        Cell::new(memory(|memory| memory.pss)),
        Cell::new(memory(|memory| memory.private)),
    ]
}

fn show(fork: &Fork, json: bool, output: Output) -> Result<()> {
    if json {
        return output.print_json(fork);
    }
    let mut facts = Facts::default();
    facts.add("fork", &fork.id);
    facts.add("template", &fork.template);
    facts.add("state", fork.state);
    if let Some(error) = &fork.error {
        facts.add("error", format!("{} ({})", error.message, error.code));
    }
    facts.add("backend", format!("{}: {}", fork.backend, fork.reason));
    facts.add("path", fork.mem_backend.backend_path.display());
    if let Some(pid) = fork.pid {
        facts.add("pid", pid);
    }
    if let Some(bytes) = fork.memory_bytes {
        facts.add("guest memory", BinaryBytes(bytes));
    }
    if let Some(faults) = &fork.faults {
        facts.add(
            "faults",
            format!(
                "{} answered, {} of them with zeros and {} after a slow read; {} pages came with others; {} installs retried",
                faults.demand, faults.zero, faults.slow, faults.around, faults.retried
            ),
        );
        facts.add(
            "pages",
            format!(
                "{} copied, {} prefaulted, {} given back; {} of zeros left to the kernel",
                BinaryBytes(fork.installed_bytes),
                faults.prefaulted,
                faults.removed,
                BinaryBytes(fork.given_back_bytes)
            ),
        );
    }
    if let Some(prefault) = &fork.prefault {
        let ForkPrefault {
            what,
            late,
            missed,
            held_out_used,
        } = prefault;
        let faults = match what {
            Prefault::None => String::new(),
            _ => format!("; first faults: {missed} not foreseen, {late} too early, {held_out_used} held out"),
        };
        facts.add("prefault", format!("{what}{faults}"));
    }
    if let Some(recording) = &fork.recording {
        facts.add(
            "recording",
            if recording.learned {
                format!("{} added to the working set", BinaryBytes(recording.size_bytes))
            } else {
                "running".to_owned()
            },
        );
    }
    if let Some(latency) = &fork.fault_latency_us {
        facts.add(
            "latency",
            format!("p50 {} us, p99 {} us, max {} us", latency.p50, latency.p99, latency.max),
        );
    }
    if let Some(memory) = &fork.memory {
        facts.add(
            "memory",
            format!(
                "{} resident, {} PSS, {} private, {} shared, {} swapped",
                BinaryBytes(memory.rss),
                BinaryBytes(memory.pss),
                BinaryBytes(memory.private),
                BinaryBytes(memory.shared),
                BinaryBytes(memory.swap)
            ),
        );
    }
    output.print(&facts.text())
}
