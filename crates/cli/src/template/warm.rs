//! `pagecast template warm`: reads a template into memory before its forks need it.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::BinaryBytes;
use pagecast_client::template::{Warm as Request, Warmth, WarmthState};
use pagecast_client::{Client, Template};

use crate::daemon::{DaemonError, EXIT_CODES};
use pagecast_command::Output;
use pagecast_command::progress::{Progress, Unit};

/// Shortest and longest time between two looks at the progress. Small templates take a few milliseconds. Each look
/// makes the daemon measure the memory of its forks.
const PACE: Duration = Duration::from_millis(10);
const LONGEST_PACE: Duration = Duration::from_millis(640);

/// Read a template into the page cache before its forks need it, and wait until it is there.
///
/// Forks with `file` map the page cache: what is in it needs no disk, and a page of 2 MiB needs one page fault only.
/// Reads the working set if one is known, else all pages that are not zeros. The kernel may evict unused pages, unless
/// the template is resident.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Warm {
    /// Name of the template.
    name: String,

    /// Lock all pages that are not zeros in memory, until --off or until the template is removed. A restarted daemon
    /// locks them again.
    #[arg(long)]
    resident: bool,

    /// Unlock the template: nothing keeps it in memory any more.
    #[arg(long, conflicts_with = "resident")]
    off: bool,
}

impl Warm {
    pub(super) async fn call(self, client: &Client, json: bool, output: Output) -> Result<()> {
        if self.off {
            return Ok(client.cool_template(&self.name).await.map_err(DaemonError::from)?);
        }
        let request = Request {
            resident: self.resident,
        };
        let begun = client
            .warm_template(&self.name, request)
            .await
            .map_err(DaemonError::from)?;
        let template = wait(client, begun).await?;
        match &template.warmth {
            Some(warmth) if warmth.state == WarmthState::Failed => bail!(
                "template {} is not in memory: {}",
                self.name,
                warmth.error.as_deref().unwrap_or("no reason is given")
            ),
            // Another client has turned it off meanwhile.
            None => bail!(
                "template {} is no longer kept in memory: another client turned that off",
                self.name
            ),
            Some(_) => super::show(&template, json, output),
        }
    }
}

/// Waits until the template is in memory, and shows the progress.
async fn wait(client: &Client, begun: Template) -> Result<Template> {
    let wanted = begun.warmth.as_ref().map_or(0, |warmth| warmth.wanted_bytes);
    let bar = Progress::bar("reading", wanted, Unit::Bytes);
    let mut template = begun;
    let mut pace = PACE;
    while let Some(warmth) = &template.warmth
        && warmth.state == WarmthState::Warming
    {
        bar.set(warmth.read_bytes);
        tokio::time::sleep(pace).await;
        pace = LONGEST_PACE.min(pace * 2);
        template = client.template(&template.name).await.map_err(DaemonError::from)?;
    }
    Ok(template)
}

/// The state of a template in memory, in a few words.
pub(super) fn describe(warmth: &Warmth) -> String {
    let [wanted, read, huge, locked] = [
        warmth.wanted_bytes,
        warmth.read_bytes,
        warmth.huge_bytes,
        warmth.locked_bytes,
    ]
    .map(BinaryBytes);
    let stays = if warmth.resident {
        format!("{locked} locked")
    } else {
        "the kernel may evict it".to_owned()
    };
    match (warmth.state, &warmth.error) {
        (WarmthState::Warming, _) => format!("{read} of {wanted} read so far"),
        (WarmthState::Warm, _) => format!("{read} read, {huge} of it in pages of 2 MiB; {stays}"),
        (WarmthState::Failed, Some(error)) => format!("no: {error}"),
        (WarmthState::Failed, None) => "no".to_owned(),
    }
}
