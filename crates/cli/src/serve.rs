//! `pagecast serve`: the daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pagecast_daemon::{Ended, Settings};

use crate::KILLED;

/// Run the daemon: templates and forks by a control API, metrics, and one page server for all.
///
/// The control API is HTTP and JSON over the unix socket DIR/control.sock; `pagecast template`, `fork`, `run` and `status`
/// use it too. Every flag can also be set in the configuration file, in TOML, with `_` for `-`; flags win.
#[derive(Args)]
#[command(after_help = "\
Signals:
  SIGTERM, SIGINT, SIGQUIT
                   Complete all forks with `uffd`, so that they run on without a daemon, and exit. If memory is short,
                   report it and keep serving. A second of these signals kills their VMMs. Forks with `file` need no
                   daemon. The next daemon of this run dir takes up templates and forks with `file`.
  SIGHUP, other signals
                   The same, but never kill. These are the signals that can be caught, are no faults, and end a process by
                   default. A signal that is ignored at the start, as by nohup, stays ignored.
  SIGIO, SIGXFSZ   No effect.
  SIGSTOP, SIGTSTP (Ctrl-Z)
                   Suspend the daemon, and with it each fork with `uffd` at its next page fault, until SIGCONT.

If stderr is not read, log lines are dropped, and counted in a line once it is read again.

Exit codes:
  0  stopped by a signal; no VMM was hurt
  1  could not start, or failed
  2  wrong usage
  3  stopped by a second SIGTERM, SIGINT or SIGQUIT; the VMMs that were still served were killed")]
pub(crate) struct Serve {
    /// Read settings from this file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    settings: Settings,
}

impl Serve {
    /// Serves until a signal asks for the end.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        crate::fd_limit::raise();
        let file = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Settings::default(),
        };
        let config = self.settings.or(file).resolve()?;
        Ok(match pagecast_daemon::serve(config)? {
            Ended::Closed => ExitCode::SUCCESS,
            Ended::Killed => ExitCode::from(KILLED),
        })
    }
}
