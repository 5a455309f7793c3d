//! Processes that do not outlive us, however we end.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// The first argument of a pagecast that is to be that. It is no command, so no help, completion or manual names it.
const EXEC: &str = "__exec";

/// This very program, also where its file has been replaced since it was started.
const OURSELVES: &str = "/proc/self/exe";

/// Becoming another program, which the kernel kills as soon as the one who started it has ended.
#[derive(Parser)]
pub(crate) struct Exec {
    /// Who started it.
    #[arg(long)]
    parent: i32,
    /// The program, and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

impl Exec {
    /// Whether this process is to do that.
    pub(crate) fn asked_for() -> Option<Self> {
        let mut arguments = std::env::args_os().skip(1);
        (arguments.next()? == EXEC).then(|| Self::parse_from([OsString::from(EXEC)].into_iter().chain(arguments)))
    }

    /// Returns only where that fails.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let (program, arguments) = self.program.split_first().context("no program")?;
        // The signal is kept through exec, save for programs with privileges of their own.
        set_parent_process_death_signal(Some(Signal::KILL)).context("cannot ask to end with our parent")?;
        // One that ended before that sends nothing any more.
        if getppid() != Pid::from_raw(self.parent) {
            return Err(anyhow!("the process that started this has ended"));
        }
        let error = Command::new(program).args(arguments).exec();
        Err(error).with_context(|| format!("cannot run {}", Path::new(program).display()))
    }
}

/// A command that runs `program`, given by an absolute path, and ends with us, even where we are killed: as soon as **the
/// thread** that starts it does, says `PR_SET_PDEATHSIG(2const)`, so this is for the main thread only.
///
/// It is in a process group of its own: a Ctrl-C on the terminal is for us, who then end it.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(OURSELVES);
    command
        .arg0("pagecast")
        .args([EXEC, "--parent", &getpid().to_string()])
        .arg(program)
        .process_group(0);
    command
}
