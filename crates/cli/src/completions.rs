//! `pagecast completions`: completion scripts for shells.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use pagecast_command::Output;

/// Print the script with which a shell completes the arguments of pagecast.
#[derive(Args)]
#[command(after_help = "\
Where to install the script:
  bash  pagecast completions bash > /usr/share/bash-completion/completions/pagecast
  zsh   pagecast completions zsh > /usr/local/share/zsh/site-functions/_pagecast
  fish  pagecast completions fish > /usr/share/fish/vendor_completions.d/pagecast.fish

Exit codes:
  0  printed
  1  could not be printed
  2  wrong usage")]
pub(crate) struct Completions {
    /// Shell to print the script for.
    shell: Shell,
}

impl Completions {
    /// Prints the script.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut crate::Cli::command(), "pagecast", &mut script);
        let script = String::from_utf8(script).context("the completions are not text")?;
        Output::stdout().print(&script)?;
        Ok(ExitCode::SUCCESS)
    }
}
