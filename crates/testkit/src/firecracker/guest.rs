//! Builds the tiny guest.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{cache, tool};

const TARGET: &str = "x86_64-unknown-none";
const NAME: &str = "pagecast-guest";

/// Builds the tiny guest if it is not up to date, and returns the path of its ELF file. Booting does this, too. Call it
/// first if the download of its Rust target must not be measured.
///
/// # Errors
///
/// Its Rust target is missing and cannot be added, or the guest does not build.
pub fn build_guest() -> Result<PathBuf> {
    let target_folder = cache::folder()?.join("guest");
    let _lock = cache::lock("guest")?;
    ensure_target_is_installed()?;

    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = guest_command(cargo);
    build
        .args(["build", "--release", "--locked", "--target-dir"])
        .arg(&target_folder);
    tool::run(&mut build).context("failed to build the tiny guest")?;
    Ok(target_folder.join(TARGET).join("release").join(NAME))
}

/// Returns `true` if the source of the guest exists at the path of this build. On another machine there is none.
pub fn has_guest_source() -> bool {
    folder().join("Cargo.toml").is_file()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest")
}

fn ensure_target_is_installed() -> Result<()> {
    let folder = tool::run(guest_command("rustc").args(["--print", "target-libdir", "--target", TARGET]))
        .context("failed to ask rustc for its targets")?;
    if Path::new(folder.trim_end()).is_dir() {
        return Ok(());
    }
    tool::run(guest_command("rustup").args(["target", "add", TARGET]))
        .with_context(|| format!("the tiny guest needs the Rust target {TARGET}: install it for this toolchain"))?;
    Ok(())
}

/// A tool in the guest's folder, with the guest's own `.cargo/config.toml`, and without settings for the build of the
/// workspace.
pub fn guest_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder());
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(is_about_another_build) {
            command.env_remove(name);
        }
    }
    command
}

/// Returns `true` if a variable would override the guest's configuration of cargo. Tests run with the variables of the
/// workspace's build: its flags and target, and the wrappers of clippy and of coverage tools.
fn is_about_another_build(name: &str) -> bool {
    let kept = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_"];
    (name.starts_with("CARGO_") && !kept.iter().any(|prefix| name.starts_with(prefix)))
        || [
            "RUSTFLAGS",
            "RUSTC",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTC_BOOTSTRAP",
        ]
        .contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_workspaces_build_do_not_reach_the_guests() {
        for name in [
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET",
            "CARGO_PROFILE_RELEASE_PANIC",
            "RUSTC_WORKSPACE_WRAPPER",
        ] {
            assert!(is_about_another_build(name), "{name} must be removed");
        }
        for name in [
            "CARGO_HOME",
            "CARGO_NET_OFFLINE",
            "RUSTUP_HOME",
            "RUSTUP_TOOLCHAIN",
            "PATH",
            "HOME",
        ] {
            assert!(!is_about_another_build(name), "{name} must be kept");
        }
    }
}
