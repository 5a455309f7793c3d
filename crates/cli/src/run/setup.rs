//! Checks before the first Firecracker is started, and preparations.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use pagecast_client::Client;
use pagecast_client::template::TemplateState;
use rustix::fs::{Access, access};

use super::firecracker::Firecracker;
use super::folder::{LeftFolder, RunFolder};
use super::forget::clean_up;
use super::jail::JailerArgs;
use super::life::Life;
use super::plan::{Plan, Wanted};
use super::say::say;
use crate::daemon::DaemonError;
use pagecast_command::harmless;

/// How to start Firecrackers.
#[derive(Args, Debug)]
pub(crate) struct Starting {
    /// Path of the Firecracker binary [default: the first `firecracker` on PATH]
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,

    /// Path of the snapshot's state file [default: the one that the template was added with]
    #[arg(long, value_name = "PATH")]
    vmstate: Option<PathBuf>,

    /// Folder in which to create the folder of the run [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Time that each step of each Firecracker may take: start, load, resume.
    #[arg(long, value_name = "TIME", default_value = "1min", value_parser = humantime::parse_duration)]
    timeout: Duration,

    #[command(flatten)]
    jailer: JailerArgs,
}

/// The state before the first Firecracker is started.
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    pub(crate) daemon: Life,
    pub(crate) folder: RunFolder,
}

impl Starting {
    /// Checks everything, cleans up after killed runs, and creates the folder.
    pub(crate) async fn prepare(&self, client: Client, wanted: Wanted) -> Result<Prepared> {
        let firecracker = Firecracker::find(self.firecracker.as_deref())?;
        let vmstate = self.vmstate(&client, &wanted.template).await?;
        let daemon = Life::of_listener(client.socket())
            .await
            .context("cannot open the daemon's process")?;
        let jailer = self.jailer.find()?;
        let base = match &jailer {
            Some((_, jailer)) => jailer.base().to_owned(),
            None => self.dir.clone().unwrap_or_else(std::env::temp_dir),
        };
        for problem in clean_up(LeftFolder::find(&base)).await {
            say(&problem);
        }
        // The jailer creates a folder with this name.
        let jails = jailer.as_ref().and_then(|_| firecracker.path.file_name());
        let folder = RunFolder::create(&base, client.socket(), jails)?;
        let jailer = jailer.map(|(program, jailer)| (program, jailer.below(folder.path())));
        let plan = Plan {
            client,
            firecracker,
            jailer,
            wanted,
            vmstate,
            patience: self.timeout,
        };
        Ok(Prepared { plan, daemon, folder })
    }

    /// The path of the state file, which exists.
    async fn vmstate(&self, client: &Client, name: &str) -> Result<PathBuf> {
        let template = client.template(name).await.map_err(DaemonError::from)?;
        if template.state == TemplateState::Changed {
            let how = harmless(template.changed.as_deref().unwrap_or("its file was replaced"));
            bail!("the template {name} cannot be forked any more: {how}");
        }
        let vmstate = match &self.vmstate {
            Some(path) => std::path::absolute(path).context("cannot find the current folder")?,
            None => template.vmstate_path.with_context(|| {
                format!("the template {name} was added without a state file: name it with --vmstate")
            })?,
        };
        // Firecracker would refuse too, once for each fork.
        access(&vmstate, Access::READ_OK)
            .with_context(|| format!("cannot read the state file {}", vmstate.display()))?;
        Ok(vmstate)
    }
}
