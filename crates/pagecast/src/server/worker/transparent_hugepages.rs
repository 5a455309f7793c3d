//! Checks whether the kernel fills unregistered memory of a VMM in transparent huge pages.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::Path;

use pagecast_uffd::{HostAddr, HostRange};

use crate::proc_files::addresses;

/// The settings of the system: as a whole, and for each size of large pages.
const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// The most bytes of a line that are read. The longest lines have names of files.
const LONGEST_LINE: u64 = 64 << 10;

/// Returns `true` if a touched page of `memory`, in the VMM `pid`, may cost more than 4 KiB if the kernel fills it.
/// Also returns `true` if that cannot be found out.
///
/// The kernel answers for each mapping (`THPeligible` in `proc_pid_smaps(5)`). The answer depends on the settings of
/// the system and of the process (`PR_SET_THP_DISABLE`), and on the advice of the VMM. The query takes the lock of the
/// VMM's mappings, which a malicious VMM may hold for any time. So do not call this on a thread that serves other
/// forks.
pub(super) fn may_be_made(pid: i32, memory: &[HostRange]) -> bool {
    if are_off(Path::new(SETTINGS)) {
        return false;
    }
    let smaps = File::open(format!("/proc/{pid}/smaps"));
    let eligible = smaps.and_then(|smaps| is_eligible(BufReader::new(smaps), memory));
    !matches!(eligible, Ok(Some(false)))
}

/// Returns `true` if no process gets large pages, whatever it asks for.
fn are_off(settings: &Path) -> bool {
    let is_off = |path: &Path| {
        let set = fs::read(path.join("enabled"));
        set.is_ok_and(|set| {
            ["[never]", "[inherit]"]
                .iter()
                .any(|off| contains(&set, off.as_bytes()))
        })
    };
    let sizes = match fs::read_dir(settings) {
        Ok(sizes) => sizes,
        // The kernel has no large pages.
        Err(error) => return error.kind() == io::ErrorKind::NotFound,
    };
    is_off(settings)
        && sizes.into_iter().all(|size| {
            let is_size = |name: &[u8]| name.starts_with(b"hugepages-");
            size.is_ok_and(|size| !is_size(size.file_name().as_encoded_bytes()) || is_off(&size.path()))
        })
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Returns whether large pages can be made in some of `memory`, by the `smaps` of its process. `None` if that does not
/// cover all of `memory`.
fn is_eligible(mut smaps: impl BufRead, memory: &[HostRange]) -> io::Result<Option<bool>> {
    let wanted: u64 = memory.iter().map(|range| range.len().get()).sum();
    let mut told = 0;
    // The number of bytes of `memory` in the current mapping, until its `THPeligible` line.
    let mut within = 0;
    let mut line = Vec::new();
    loop {
        line.clear();
        if smaps.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok((told == wanted).then_some(false));
        }
        if let Some(mapping) = mapping(&line) {
            let common = |range: &HostRange| range.intersection(mapping).map_or(0, |common| common.len().get());
            within = memory.iter().map(common).sum();
        } else if within > 0
            && let Some(value) = line.strip_prefix(b"THPeligible:")
        {
            if value.trim_ascii() != b"0" {
                return Ok(Some(true));
            }
            told += within;
            within = 0;
        }
    }
}

/// The mapping, if `line` is the first line of one.
fn mapping(line: &[u8]) -> Option<HostRange> {
    let (start, end) = addresses(line)?;
    HostRange::between(HostAddr::new(start), HostAddr::new(end))
}

#[cfg(test)]
mod tests {
    use pagecast_uffd::ByteLen;

    use super::*;

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::new(HostAddr::new(start), ByteLen::new(end - start)).unwrap()
    }

    /// Two mappings and the lines between them; a malicious user has named one of them.
    fn smaps(first: &str, second: &str) -> Vec<u8> {
        let mut smaps = Vec::new();
        for (header, eligible) in [
            (&b"10000000-10400000 rw-p 00000000 00:00 0"[..], first),
            (
                &b"20000000-20001000 r--p 00000000 00:01 7   /\xff-THPeligible: 1"[..],
                "1",
            ),
            (&b"7f0000000000-7f0000200000 rw-p 00000000 00:00 0"[..], second),
        ] {
            smaps.extend_from_slice(header);
            smaps.extend_from_slice(b"\nSize:               4096 kB\nTHPeligible:           ");
            smaps.extend_from_slice(eligible.as_bytes());
            smaps.extend_from_slice(b"\nVmFlags: rd wr mr mw me um nr hg \n");
        }
        smaps
    }

    #[test]
    fn the_mappings_that_hold_the_memory_tell() {
        let memory = [
            range(0x1000_0000, 0x1020_0000),
            range(0x7f00_0000_0000, 0x7f00_0010_0000),
        ];
        let told = |first, second| is_eligible(&*smaps(first, second), &memory).unwrap();
        assert_eq!(told("0", "0"), Some(false));
        assert_eq!(told("1", "0"), Some(true));
        assert_eq!(told("0", "1"), Some(true));
        assert_eq!(told("0", ""), Some(true), "not said");
    }

    #[test]
    fn memory_that_no_mapping_holds_may_be_anything() {
        let memory = [range(0x1000_0000, 0x1080_0000)];
        assert_eq!(is_eligible(&*smaps("0", "0"), &memory).unwrap(), None);
        assert_eq!(is_eligible(&b""[..], &memory).unwrap(), None);
        let old_kernel = &b"10000000-10800000 rw-p 00000000 00:00 0\nSize: 8192 kB\n"[..];
        assert_eq!(is_eligible(old_kernel, &memory).unwrap(), None);
        assert!(may_be_made(0, &memory) || are_off(Path::new(SETTINGS)));
    }

    #[test]
    fn what_a_mapping_is_is_read_from_any_bytes() {
        assert_eq!(mapping(b"1000-2000 rw-p"), Some(range(0x1000, 0x2000)));
        for line in [
            &b"2000-1000 rw-p"[..],
            b"-",
            b"1000-",
            b"",
            b"\xff-\xfe x",
            b"1000-99999999999999999999 r",
        ] {
            assert_eq!(mapping(line), None, "{line:?}");
        }
    }

    #[test]
    fn the_settings_are_off_where_all_of_them_are() {
        let folder = tempfile::tempdir().unwrap();
        let set = |size: &str, text: &str| {
            fs::create_dir_all(folder.path().join(size)).unwrap();
            fs::write(folder.path().join(size).join("enabled"), text).unwrap();
        };
        set("", "always madvise [never]\n");
        set("khugepaged", "no setting");
        set("hugepages-2048kB", "always [inherit] madvise never\n");
        assert!(are_off(folder.path()));
        set("hugepages-64kB", "always inherit [madvise] never\n");
        assert!(!are_off(folder.path()));
        set("hugepages-64kB", "always inherit madvise [never]\n");
        set("", "[always] madvise never\n");
        assert!(!are_off(folder.path()));
        assert!(are_off(&folder.path().join("none")));
    }
}
