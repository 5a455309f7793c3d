//! File systems that a test mounts, unmounted when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::skip::skip;

/// Size of the images of file systems, in bytes: XFS needs that much. They are sparse files.
const IMAGE: u64 = 400 << 20;

/// A file system of a test.
#[derive(Debug)]
pub struct Mounted {
    /// Mount points, in the order of mounting.
    points: Vec<PathBuf>,
    folder: TempDir,
}

impl Mounted {
    /// Mounts an overlay file system with its layers on a tmpfs. `None`, and a reported skip, if it cannot be mounted.
    pub fn overlay() -> Option<Self> {
        let mounted = Self::tmpfs()?;
        let layer = |name: &str| mounted.folder.path().join("mnt").join(name);
        let (lower, upper, work, merged) = (layer("lower"), layer("upper"), layer("work"), layer("merged"));
        for path in [&lower, &upper, &work, &merged] {
            std::fs::create_dir(path).ok()?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let done = run(Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&merged));
        mounted.taken(done, merged)
    }

    /// Mounts a tmpfs, with the same condition.
    pub fn tmpfs() -> Option<Self> {
        let mounted = Self::unmounted()?;
        let point = mounted.folder.path().join("mnt");
        let done = run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&point));
        mounted.taken(done, point)
    }

    /// Mounts a new file system of this type (`ext4`, `xfs`, `btrfs`) in a file, with the same condition.
    pub fn image(kind: &str) -> Option<Self> {
        let mounted = Self::unmounted()?;
        let (image, point) = (mounted.folder.path().join("image"), mounted.folder.path().join("mnt"));
        let made = std::fs::File::create(&image)
            .and_then(|file| file.set_len(IMAGE))
            .context("failed to make an image")
            .and_then(|()| run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image)))
            .and_then(|()| {
                run(Command::new("mount")
                    .args(["-t", kind, "-o", "loop"])
                    .arg(&image)
                    .arg(&point))
            });
        mounted.taken(made, point)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.points.last().map_or(self.folder.path(), PathBuf::as_path)
    }

    /// The upper layer of an overlay, by a path that does not lead through it.
    pub fn upper(&self) -> PathBuf {
        self.folder.path().join("mnt/upper")
    }

    fn unmounted() -> Option<Self> {
        let folder = tempfile::tempdir().ok()?;
        std::fs::create_dir(folder.path().join("mnt")).ok()?;
        Some(Self {
            points: Vec::new(),
            folder,
        })
    }

    fn taken(mut self, mounted: Result<()>, point: PathBuf) -> Option<Self> {
        match mounted {
            Ok(()) => {
                self.points.push(point);
                Some(self)
            }
            Err(error) => {
                skip(&format!("a file system of the test's own: {error:#}"));
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for point in self.points.iter().rev() {
            // Lazily: files that are still open keep the mount until they are closed.
            if let Err(error) = run(Command::new("umount").arg("-l").arg(point)) {
                eprintln!("failed to unmount {}: {error:#}", point.display());
            }
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("failed to run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", said.trim());
    Ok(())
}
