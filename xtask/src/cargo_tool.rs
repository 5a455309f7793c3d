//! Subcommands of cargo that are installed if they are missing.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::cargo::{cargo, metadata, workspace_root};

/// A subcommand of cargo.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CargoTool {
    /// The package, without `cargo-`.
    pub(crate) name: &'static str,
    /// The version to install.
    pub(crate) version: &'static str,
}

impl CargoTool {
    /// `cargo NAME`, in the root of the workspace: the one that is installed, else `version`, built below `target`.
    pub(crate) fn command(&self) -> Result<Command> {
        if self.is_installed() {
            return Ok(cargo(self.name));
        }
        let mut command = Command::new(self.install()?);
        command.current_dir(workspace_root()).arg(self.name);
        Ok(command)
    }

    /// Lets another tool find this one as a subcommand of cargo.
    pub(crate) fn provide_to(&self, other: &mut Command) -> Result<()> {
        if self.is_installed() {
            return Ok(());
        }
        let program = self.install()?;
        let folder = program.parent().map(Path::to_owned);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(folder.into_iter().chain(std::env::split_paths(&path)));
        other.env("PATH", path.context("a folder of PATH has an impossible name")?);
        Ok(())
    }

    fn is_installed(&self) -> bool {
        let installed = cargo(self.name)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        installed.is_ok_and(|status| status.success())
    }

    /// Builds the tool if it was not built before. Returns the path of its program.
    fn install(&self) -> Result<PathBuf> {
        let root = metadata()?.target_directory.join("pagecast/tools");
        let package = format!("cargo-{}", self.name);
        let program: PathBuf = root.join("bin").join(&package).into();
        if !program.exists() {
            eprintln!("{package} is not installed: building it, once, which takes some minutes");
            let mut install = cargo("install");
            install
                .args(["--locked", &package, "--version", self.version, "--root"])
                .arg(&root);
            ensure!(
                status(&mut install)?.success(),
                "{package} cannot be installed; try `cargo install --locked {package}`"
            );
        }
        Ok(program)
    }
}

/// Runs `command` and waits for its end.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("failed to start {command:?}"))
}
