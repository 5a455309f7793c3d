//! A FUSE mount with one file, served by this process. The kernel caches its attributes for an hour, as clients of a
//! file server do for some seconds.
//!
//! Implements only the part of the protocol (`linux/fuse.h`) that a reader of the file needs.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::skip::skip;

/// Time for which the kernel may cache attributes, in seconds.
const VALID: u64 = 3600;

/// The inode number of the file; that of the folder is 1.
const INODE: u64 = 2;

/// Longest request. Longer ones have data of writes, which this file does not take.
const LONGEST_REQUEST: usize = 1 << 18;

/// The state of the server.
#[derive(Debug)]
struct Served {
    bytes: Vec<u8>,
    /// Seconds of its mtime and ctime.
    changed: u64,
}

/// The mount, until it is dropped.
#[derive(Debug)]
pub struct FuseFile {
    folder: TempDir,
    served: Arc<Mutex<Served>>,
}

impl FuseFile {
    /// Mounts a file with these bytes. `None`, and a reported skip, if FUSE cannot be mounted here.
    pub fn mount(bytes: Vec<u8>) -> Option<Self> {
        match Self::try_mount(bytes) {
            Ok(mounted) => Some(mounted),
            Err(error) => {
                skip(&format!("a FUSE mount of the test's own: {error:#}"));
                None
            }
        }
    }

    fn try_mount(bytes: Vec<u8>) -> Result<Self> {
        let folder = tempfile::tempdir().context("failed to make a folder")?;
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("failed to open /dev/fuse")?;
        // The `mount` of util-linux passes the descriptor on; it keeps its number there.
        let number = device.as_raw_fd();
        rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).context("failed to hand on /dev/fuse")?;
        let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other");
        let output = Command::new("mount")
            .args(["-i", "-t", "fuse", "-o", &options, "pagecast-test"])
            .arg(folder.path())
            .output()
            .context("failed to run mount")?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::CLOEXEC).context("failed to keep /dev/fuse")?;
        let served = Arc::new(Mutex::new(Served { bytes, changed: 1 }));
        let serving = Arc::clone(&served);
        std::thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || serve(device, &serving))
            .context("failed to start a thread")?;
        Ok(Self { folder, served })
    }

    /// Path of the file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mem")
    }

    /// The mount point.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Replaces the bytes on the server by as many others, without telling the kernel.
    pub fn overwrite(&self, bytes: Vec<u8>) {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.bytes = bytes;
        served.changed += 1;
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        // The server's thread ends with the last user of the mount.
        let _ = Command::new("umount").arg("-l").arg(self.folder.path()).status();
    }
}

fn serve(mut device: File, served: &Mutex<Served>) {
    let mut request = vec![0; LONGEST_REQUEST];
    // ENODEV after the unmount.
    while let Ok(len) = device.read(&mut request) {
        let Some((opcode, unique, node, body)) = split(request.get(..len).unwrap_or_default()) else {
            return;
        };
        let served = served.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(answer) = answer(opcode, node, body, &served) else {
            continue;
        };
        drop(served);
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let mut reply = u32::try_from(16 + body.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes()
            .to_vec();
        reply.extend(error.to_le_bytes());
        reply.extend(unique.to_le_bytes());
        reply.extend(body);
        // Fails for a request that was interrupted.
        let _ = device.write(&reply);
    }
}

/// Operation, number of the request, inode, and what follows.
fn split(request: &[u8]) -> Option<(u32, u64, u64, &[u8])> {
    let number = |at: usize| Some(u64::from_le_bytes(request.get(at..at + 8)?.try_into().ok()?));
    let opcode = u32::from_le_bytes(request.get(4..8)?.try_into().ok()?);
    Some((opcode, number(8)?, number(16)?, request.get(40..)?))
}

/// `None` for requests without an answer.
fn answer(opcode: u32, node: u64, body: &[u8], served: &Served) -> Option<Result<Vec<u8>, rustix::io::Errno>> {
    Some(match opcode {
        // LOOKUP
        1 if body == b"mem\0" => Ok(words64(&[INODE, 0, VALID, VALID, 0])
            .into_iter()
            .chain(attributes(INODE, served))
            .collect()),
        1 => Err(rustix::io::Errno::NOENT),
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => return None,
        // GETATTR
        3 => Ok(words64(&[VALID, 0])
            .into_iter()
            .chain(attributes(node, served))
            .collect()),
        // OPEN, OPENDIR
        14 | 27 => Ok(words64(&[0, 0])),
        // READ
        15 => {
            let offset = body.get(8..16).and_then(|bytes| bytes.try_into().ok());
            let size = body.get(16..20).and_then(|bytes| bytes.try_into().ok());
            let offset = usize::try_from(u64::from_le_bytes(offset?)).ok()?;
            let size = usize::try_from(u32::from_le_bytes(size?)).ok()?;
            let start = offset.min(served.bytes.len());
            let end = offset.saturating_add(size).min(served.bytes.len());
            Ok(served.bytes.get(start..end).unwrap_or_default().to_vec())
        }
        // STATFS
        17 => Ok(vec![0; 80]),
        // RELEASE, FLUSH, RELEASEDIR
        18 | 25 | 29 => Ok(Vec::new()),
        // INIT: version 7.31, no optional features.
        26 => {
            let mut reply = Vec::new();
            for word in [7u32, 31, 1 << 17, 0, 0, 1 << 17, 1] {
                reply.extend(word.to_le_bytes());
            }
            reply.resize(64, 0);
            Ok(reply)
        }
        _ => Err(rustix::io::Errno::NOSYS),
    })
}

fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A `struct fuse_attr`.
fn attributes(node: u64, served: &Served) -> Vec<u8> {
    let is_file = node == INODE;
    let size = if is_file { served.bytes.len() as u64 } else { 0 };
    let mut attributes = words64(&[node, size, size / 512, 0, served.changed, served.changed]);
    let mode = if is_file { 0o100_444 } else { 0o040_555 };
    for word in [0u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        attributes.extend(word.to_le_bytes());
    }
    attributes
}
