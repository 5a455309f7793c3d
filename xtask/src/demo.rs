//! `cargo xtask demo`: many forks of one template, served by one `pagecast handle`, every byte checked.

mod firecracker;
mod progress;
mod report;
mod scenario;
mod server;
mod simulated;
mod vmm;

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use cargo_metadata::Message;
use pagecast_testkit::firecracker::{Kvm, binary, build_guest, kvm};

use self::progress::{Progress, say};
use self::report::Report;
use self::scenario::Scenario;
use self::server::Server;
use self::vmm::Template;
use crate::cargo::cargo;
use crate::interrupt::Interrupt;

/// Fork one microVM many times and check every byte that the forks read
///
/// Boots a tiny guest in Firecracker and snapshots it, starts `pagecast handle` for the snapshot's memory, and restores
/// all forks at once. Every guest reads and checks all its memory, writes to a part of it, checks again, and checks once
/// more after the server has gone. Without KVM, simulated VMMs do the same. Gets and builds all it needs; leaves nothing
/// behind but what is kept in the target folder.
///
/// The exit code is 0 if every byte was right, 1 if not or if something failed, 128 and the signal if interrupted.
#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// How many forks
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    forks: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Demo {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let interrupt = Interrupt::watch()?;
        let outcome = self.show(&interrupt);
        if let Some(signal) = interrupt.signal() {
            say("interrupted: every process was ended, every temporary file removed");
            return Ok(u8::try_from(128 + signal).map_or(ExitCode::FAILURE, ExitCode::from));
        }
        let report = outcome?;
        report.print(self.json)?;
        ensure!(report.mismatches() == 0, "some guests read wrong bytes");
        Ok(ExitCode::SUCCESS)
    }

    fn show(&self, interrupt: &Interrupt) -> Result<Report> {
        let kvm = kvm()?;
        if let Kvm::Missing(why) = &kvm {
            say(&format!("{why}: simulated VMMs take the place of Firecracker"));
        }
        let pagecast = build_pagecast()?;
        let folder = tempfile::Builder::new()
            .prefix("pagecast-demo-")
            .tempdir()
            .context("failed to create a folder for the template")?;
        let template = match &kvm {
            Kvm::Usable => boot_and_snapshot(folder.path())?,
            Kvm::Missing(_) => simulate(folder.path())?,
        };
        interrupt.check()?;

        let started = Instant::now();
        let mut server = Server::start(&pagecast, folder.path(), template.mem_file())?;
        let scenario = Scenario {
            template: &*template,
            forks: self.forks,
            interrupt,
        };
        match scenario.play(&mut server) {
            Ok(played) => Ok(Report::new(&kvm, &played, started.elapsed())),
            Err(error) => Err(server.explain(&error)),
        }
    }
}

/// Builds the command as it is shipped; where it is.
fn build_pagecast() -> Result<PathBuf> {
    let mut build = cargo("build")
        .args([
            "--locked",
            "--release",
            "--package",
            "pagecast-cli",
            "--bin",
            "pagecast",
        ])
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start cargo")?;
    let output = build.stdout.take().expect("it was given a pipe");
    let mut executable = None;
    for message in Message::parse_stream(std::io::BufReader::new(output)) {
        if let Message::CompilerArtifact(artifact) = message.context("failed to read what cargo says")? {
            executable = artifact.executable.or(executable);
        }
    }
    let status = build.wait().context("failed to wait for cargo")?;
    ensure!(status.success(), "pagecast does not build");
    executable
        .map(PathBuf::from)
        .context("cargo did not say where it built pagecast")
}

/// A template of real Firecracker.
fn boot_and_snapshot(folder: &Path) -> Result<Box<dyn Template>> {
    let progress = Progress::start("getting Firecracker and the guest");
    build_guest()?;
    let binary = binary()?;
    progress.done(&binary.display().to_string());

    let progress = Progress::start("booting and snapshotting the guest");
    let template = firecracker::Template::create(folder)?;
    progress.done(&template.to_string());
    Ok(Box::new(template))
}

/// A template of the same size for simulated VMMs.
fn simulate(folder: &Path) -> Result<Box<dyn Template>> {
    let progress = Progress::start("building the simulated VMM and its template");
    let mut build = cargo("build");
    build.args(["--locked", "--quiet", "--package", "pagecast-testkit", "--bins"]);
    // It is looked for beside us, and we have its parts built already.
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    let status = build.stdout(Stdio::null()).status().context("failed to start cargo")?;
    ensure!(status.success(), "the simulated VMM does not build");
    let template = simulated::Template::create(folder)?;
    progress.done(&template.to_string());
    Ok(Box::new(template))
}
