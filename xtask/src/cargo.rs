//! Calls of cargo, and its metadata of the workspace.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use cargo_metadata::{Message, Metadata, MetadataCommand};

/// The root of the workspace.
pub(crate) fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package xtask is a folder of the workspace")
}

/// The cargo that runs this.
pub(crate) fn cargo_path() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// `cargo SUBCOMMAND`, in the root of the workspace.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(cargo_path());
    command.current_dir(workspace_root()).arg(subcommand);
    command
}

/// Returns the metadata of the workspace. Fails if `Cargo.lock` is not up to date.
pub(crate) fn metadata() -> Result<Metadata> {
    MetadataCommand::new()
        .current_dir(workspace_root())
        .other_options(["--locked".to_owned()])
        .exec()
        .context("failed to read the workspace")
}

/// Builds the command as it is shipped. Returns its path.
pub(crate) fn build_pagecast() -> Result<PathBuf> {
    build_command("pagecast-cli", "pagecast")
}

/// Builds the benchmark, and the command that it measures beside it. Returns its path.
pub(crate) fn build_bench() -> Result<PathBuf> {
    build_pagecast()?;
    build_command("pagecast-bench", "pagecast-bench")
}

fn build_command(package: &str, name: &str) -> Result<PathBuf> {
    let options = ["--locked", "--release", "--package", package, "--bin", name];
    built_executable(cargo("build").args(options)).with_context(|| format!("{name} does not build"))
}

/// Runs `build`, a `cargo build` of one program. Returns its path.
pub(crate) fn built_executable(build: &mut Command) -> Result<PathBuf> {
    let mut build = build
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
    ensure!(status.success(), "{status}");
    executable
        .map(PathBuf::from)
        .context("cargo did not report the path of the program")
}
