//! Reads from the state file of a snapshot whether the guest's memory has pages of 2 MiB.
//!
//! This is a pure function of the first bytes of the file, which cannot panic. Firecracker 1.7 to 1.14 (snapshot
//! versions 1 to 8) write with `bincode`: little-endian integers of fixed length, strings after their length, options
//! after a byte. The file begins with (`src/vmm/src/snapshot/mod.rs` and `persist.rs` in Firecracker's tree):
//!
//! | field | as |
//! | --- | --- |
//! | magic number | `u64` |
//! | snapshot version, `MAJOR.MINOR.PATCH` | string |
//! | memory in MiB | `u64` |
//! | SMT | `bool` |
//! | CPU template | `u32` |
//! | kernel image | string |
//! | initrd, boot arguments | optional strings |
//! | pages: 0 for 4 KiB, 1 for 2 MiB of hugetlbfs | `u32` |
//!
//! Later versions are written with `bitcode`, which has no fixed offsets. Their page size is not known.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use pagecast::PageSize;
use rustix::fs::OFlags;

/// Bytes read from a file. Only paths and boot arguments vary in length.
const HEAD: u64 = 32 << 10;

/// The magic numbers on x86-64 and aarch64.
const MAGIC: [u64; 2] = [0x0710_1984_8664_0000, 0x0710_1984_AAAA_0000];

/// Snapshot versions with this format.
const VERSIONS: std::ops::RangeInclusive<u64> = 1..=8;

/// The longest string in bytes.
const LONGEST: u64 = 16 << 10;

/// The number of CPU templates.
const CPU_TEMPLATES: u32 = 6;

/// Returns the page size of the guest with the state file at `path` and a memory file of `memory_bytes`; `None` if it
/// is not known.
///
/// # Errors
///
/// The file cannot be read.
pub(crate) fn page_size_at(path: &Path, memory_bytes: u64) -> io::Result<Option<PageSize>> {
    let mut head = Vec::new();
    // The file at the path may have been replaced, even by a FIFO.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    file.take(HEAD).read_to_end(&mut head)?;
    Ok(page_size(&head, memory_bytes))
}

/// Returns the page size of the guest whose state file begins with `head`, and whose memory file has `memory_bytes`.
/// `None` if the version is unknown, or the file is that of another guest.
pub fn page_size(head: &[u8], memory_bytes: u64) -> Option<PageSize> {
    let mut fields = Fields(head);
    if !MAGIC.contains(&fields.u64()?) {
        return None;
    }
    let version = std::str::from_utf8(fields.string()?).ok()?;
    let (major, _) = version.split_once('.')?;
    if !VERSIONS.contains(&major.parse().ok()?) {
        return None;
    }
    // Memory that was plugged in later is not counted here, but is in the memory file.
    let memory_mib = fields.u64()?;
    if memory_mib == 0 || memory_mib.checked_mul(1 << 20)? > memory_bytes {
        return None;
    }
    let _smt = fields.flag()?;
    if fields.u32()? >= CPU_TEMPLATES {
        return None;
    }
    let _kernel = fields.string()?;
    let _initrd = fields.optional_string()?;
    let _boot_args = fields.optional_string()?;
    match fields.u32()? {
        0 => Some(PageSize::Small),
        1 => Some(PageSize::Huge),
        _ => None,
    }
}

/// The bytes left to be read. Each method takes one field from the front, or returns `None` if the bytes are no such
/// field.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.take()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u64().filter(|length| *length <= LONGEST)?;
        let (string, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(string)
    }

    #[expect(
        clippy::option_option,
        reason = "one for the field, and one for whether it can be read"
    )]
    fn optional_string(&mut self) -> Option<Option<&'a [u8]>> {
        if self.flag()? {
            self.string().map(Some)
        } else {
            Some(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use pagecast_testkit::firecracker::{Snapshot, SnapshotOptions, kvm};
    use pagecast_testkit::hugepages::HugePages;
    use proptest::prelude::*;

    use super::*;

    /// A state file as Firecracker writes it.
    fn written(version: &str, memory_mib: u64, boot_args: Option<&str>, pages: u32) -> Vec<u8> {
        let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut bytes = MAGIC[0].to_le_bytes().to_vec();
        bytes.extend(string(version));
        bytes.extend(memory_mib.to_le_bytes());
        bytes.push(0);
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(string("/a kernel"));
        bytes.push(0);
        bytes.push(boot_args.is_some().into());
        bytes.extend(boot_args.map(string).unwrap_or_default());
        bytes.extend(pages.to_le_bytes());
        bytes.extend([7; 100]);
        bytes
    }

    #[test]
    fn only_what_is_surely_said_is_known() {
        let known = |bytes: &[u8]| page_size(bytes, 128 << 20);
        for args in [None, Some("console=ttyS0")] {
            assert_eq!(known(&written("6.0.0", 128, args, 0)), Some(PageSize::Small));
            assert_eq!(known(&written("8.0.0", 128, args, 1)), Some(PageSize::Huge));
            assert_eq!(known(&written("6.0.0", 128, args, 2)), None);
            for version in ["0.25.0", "9.0.0", "10.0.0", "6", "", "-6.0.0", "x.0.0"] {
                assert_eq!(known(&written(version, 128, args, 1)), None, "{version}");
            }
            for memory_mib in [0, 129, u64::MAX] {
                assert_eq!(known(&written("6.0.0", memory_mib, args, 1)), None, "{memory_mib}");
            }
            let whole = written("6.0.0", 128, args, 1);
            let end = whole.len() - 100;
            assert!((0..end).all(|length| known(&whole[..length]).is_none()));
        }
        assert_eq!(known(&written("6.0.0", 128, Some(&"x".repeat(17 << 10)), 1)), None);
    }

    #[test]
    fn the_real_firecracker_says_which_pages_its_guest_has() {
        if kvm().unwrap().skips() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        for huge_pages in [false, true] {
            let options = SnapshotOptions {
                huge_pages,
                ..SnapshotOptions::default()
            };
            let pages = if huge_pages { u64::from(options.mem_mib) / 2 } else { 0 };
            let Some(_pages) = HugePages::reserve(pages).unwrap() else {
                continue;
            };
            let snapshot = Snapshot::create(&options, folder.path()).unwrap();
            let length = std::fs::metadata(&snapshot.mem_path).unwrap().len();
            let expected = if huge_pages { PageSize::Huge } else { PageSize::Small };
            assert_eq!(page_size_at(&snapshot.vmstate_path, length).unwrap(), Some(expected));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes: Vec<u8>, memory_bytes: u64) {
            let _ = page_size(&bytes, memory_bytes);
            let whole = [&written("6.0.0", 1, Some("x"), 1)[..24], &bytes].concat();
            let _ = page_size(&whole, memory_bytes);
        }
    }
}
