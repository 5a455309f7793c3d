//! `pagecast template warm`: a template in memory ahead of its forks.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::BinaryBytes;
use pagecast_client::template::{Warm as Request, Warmth, WarmthState};
use pagecast_client::{Client, Template};

use crate::daemon::{DaemonError, EXIT_CODES};
use pagecast_command::Output;
use pagecast_command::progress::{Progress, Unit};

/// How long until it is asked how far it is: at first, and at last. Small templates take a few milliseconds, and asking has
/// the daemon measure its forks.
const PACE: Duration = Duration::from_millis(10);
const LONGEST_PACE: Duration = Duration::from_millis(640);

/// Bring a template into memory ahead of its forks, and wait until it is there.
///
/// Forks with `file` map the page cache: what is there costs them no disk, and what is there in pages of 2 MiB one page fault
/// for each of those. Reads the working set, or where none is known, all that is not zeros. What nobody uses the kernel may
/// give up again, unless it is resident.
#[derive(Args)]
#[command(after_help = EXIT_CODES)]
pub(super) struct Warm {
    /// Its name.
    name: String,

    /// Keep all that is not zeros in memory, also where memory is short, until it is taken back with --off or the template
    /// is removed. A daemon that is started again keeps it again.
    #[arg(long)]
    resident: bool,

    /// Stop: nothing of it is kept in memory any more.
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
                warmth.error.as_deref().unwrap_or("it is not said why")
            ),
            // Somebody else has taken it back meanwhile.
            None => bail!(
                "template {} is no longer wanted in memory: somebody has asked for that",
                self.name
            ),
            Some(_) => super::show(&template, json, output),
        }
    }
}

/// Waits until it is there, and shows how far it is.
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

/// How far a template is in memory, in a few words.
pub(super) fn describe(warmth: &Warmth) -> String {
    let [wanted, read, huge, locked] = [
        warmth.wanted_bytes,
        warmth.read_bytes,
        warmth.huge_bytes,
        warmth.locked_bytes,
    ]
    .map(BinaryBytes);
    let stays = if warmth.resident {
        format!("{locked} kept there")
    } else {
        "the kernel may give it up".to_owned()
    };
    match (warmth.state, &warmth.error) {
        (WarmthState::Warming, _) => format!("{read} of {wanted} read so far"),
        (WarmthState::Warm, _) => format!("{read} read, {huge} of it in pages of 2 MiB; {stays}"),
        (WarmthState::Failed, Some(error)) => format!("no: {error}"),
        (WarmthState::Failed, None) => "no".to_owned(),
    }
}
