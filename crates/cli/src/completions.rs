//! `pagecast completions`: what a shell needs to complete this command's line.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use pagecast_command::Output;

/// Print what a shell needs to complete the arguments of pagecast.
#[derive(Args)]
#[command(after_help = "\
Where it goes:
  bash  pagecast completions bash > /usr/share/bash-completion/completions/pagecast
  zsh   pagecast completions zsh > /usr/local/share/zsh/site-functions/_pagecast
  fish  pagecast completions fish > /usr/share/fish/vendor_completions.d/pagecast.fish

Exit codes:
  0  printed
  1  could not be printed
  2  wrong usage")]
pub(crate) struct Completions {
    /// The shell.
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
