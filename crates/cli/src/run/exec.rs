//! Child processes that the kernel kills when we end.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// The first argument of a pagecast that starts such a child. It is no command: no help, completion or manual page
/// shows it.
const EXEC: &str = "__exec";

/// This program, even if its file has been replaced meanwhile.
const OURSELVES: &str = "/proc/self/exe";

/// Replaces this process by another program, which the kernel kills once our parent has ended.
#[derive(Parser)]
pub(crate) struct Exec {
    /// Process ID of the parent.
    #[arg(long)]
    parent: i32,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

impl Exec {
    /// The parsed arguments, if this process was started with [`EXEC`].
    pub(crate) fn asked_for() -> Option<Self> {
        let mut arguments = std::env::args_os().skip(1);
        (arguments.next()? == EXEC).then(|| Self::parse_from([OsString::from(EXEC)].into_iter().chain(arguments)))
    }

    /// Runs the program. Returns only if that fails.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let (program, arguments) = self.program.split_first().context("no program")?;
        // The signal is kept through exec, except for programs with privileges of their own.
        set_parent_process_death_signal(Some(Signal::KILL)).context("cannot set the parent-death signal")?;
        // A parent that had ended before sends no signal.
        if getppid() != Pid::from_raw(self.parent) {
            return Err(anyhow!("the process that started this has ended"));
        }
        let error = Command::new(program).args(arguments).exec();
        Err(error).with_context(|| format!("cannot run {}", Path::new(program).display()))
    }
}

/// A command that runs `program`, an absolute path, until we end, even if we are killed. The kernel kills the child
/// when **the thread** that starts it ends (`PR_SET_PDEATHSIG(2const)`), so start it on the main thread only.
///
/// The child gets a process group of its own: a Ctrl-C on the terminal signals only us, and we end the child.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(OURSELVES);
    command
        .arg0("pagecast")
        .args([EXEC, "--parent", &getpid().to_string()])
        .arg(program)
        .process_group(0);
    command
}
