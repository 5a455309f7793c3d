//! `pagecast man`: manual pages.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _};

use pagecast_command::Output;

/// Print the manual page of pagecast, or write the pages of all its commands into a folder.
#[derive(Args)]
#[command(after_help = "\
Where to install the pages:
  pagecast man --out /usr/local/share/man/man1

Exit codes:
  0  printed, or all pages are written
  1  could not be printed or written
  2  wrong usage")]
pub(crate) struct Man {
    /// Folder for pagecast.1 and a page for each command. Created if it is missing.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Man {
    /// Prints the main page, or writes all pages.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        match &self.out {
            Some(folder) => write_all(folder)?,
            None => Output::stdout().print(&main_page()?)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn main_page() -> Result<String> {
    let mut page = Vec::new();
    clap_mangen::Man::new(crate::Cli::command().disable_help_subcommand(true))
        .render(&mut page)
        .context("cannot make the manual page")?;
    String::from_utf8(page).context("the manual page is not text")
}

fn write_all(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    clap_mangen::generate_to(crate::Cli::command(), folder)
        .with_context(|| format!("cannot write manual pages into {}", folder.display()))
}
