//! Files of `/proc` with names that other users chose. They are read as bytes, since names of files, mounts and cgroups
//! need not be UTF-8.
//!
//! Pure functions that cannot panic. A malformed line is an error of its own, so that a caller can tell *unknown* from
//! *not there*.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A line is not as the kernel writes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the line \"{}\" cannot be read", line.escape_ascii())]
pub struct UnreadableLine {
    /// The line.
    pub line: Vec<u8>,
}

impl UnreadableLine {
    fn of(line: &[u8]) -> Self {
        Self { line: line.to_vec() }
    }
}

/// A mapping: a line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// Its first address.
    pub start: u64,
    /// The first address after it.
    pub end: u64,
    /// The offset in its file, in bytes.
    pub offset: u64,
    /// Major and minor number of the device of its file.
    pub device: (u32, u32),
    /// The number of its file's inode; 0 if it has no file.
    pub inode: u64,
    /// The path of its file as the kernel writes it (see [`path_in_maps`]), a name in brackets, or nothing.
    pub path: &'a [u8],
}

/// Returns the mappings in a `/proc/PID/maps` (`proc_pid_maps(5)`).
pub fn mappings(maps: &[u8]) -> impl Iterator<Item = Result<Mapping<'_>, UnreadableLine>> {
    lines(maps).map(|line| mapping(line).ok_or_else(|| UnreadableLine::of(line)))
}

/// `start-end perms offset major:minor inode`, spaces, and a path if there is one.
fn mapping(line: &[u8]) -> Option<Mapping<'_>> {
    let (start, end) = addresses(line)?;
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let _addresses = fields.next()?;
    let _permissions = fields.next()?;
    let offset = number(fields.next()?, 16)?;
    let (major, minor) = split_once(fields.next()?, b':')?;
    let inode = number(fields.next()?, 10)?;
    let path = fields.next().unwrap_or_default();
    // Spaces before the path fill the line up to a column. Those after it belong to the path.
    let padding = path.iter().take_while(|byte| **byte == b' ').count();
    Some(Mapping {
        start,
        end,
        offset,
        device: (number(major, 16)?.try_into().ok()?, number(minor, 16)?.try_into().ok()?),
        inode,
        path: path.get(padding..).unwrap_or_default(),
    })
}

/// Returns the first address of a mapping and the first address after it, from its first line in `maps` or `smaps`.
pub(crate) fn addresses(line: &[u8]) -> Option<(u64, u64)> {
    let (start, end) = split_once(line.split(|byte| *byte == b' ').next()?, b'-')?;
    Some((number(start, 16)?, number(end, 16)?))
}

/// Returns a path as the kernel writes it in `/proc/PID/maps`: a newline is `\012`, and a backslash stays, so that two
/// paths may look the same. Paths must be compared in this form.
pub fn path_in_maps(path: &Path) -> Cow<'_, Path> {
    let bytes = path.as_os_str().as_bytes();
    if !bytes.contains(&b'\n') {
        return Cow::Borrowed(path);
    }
    let escaped = bytes
        .split(|byte| *byte == b'\n')
        .collect::<Vec<_>>()
        .join(&br"\012"[..]);
    Cow::Owned(OsString::from_vec(escaped).into())
}

/// Returns `true` if a mapping in a `/proc/PID/smaps` has this flag, such as `um` (`VmFlags` in `proc_pid_smaps(5)`).
pub fn has_flag(smaps: &[u8], flag: &str) -> bool {
    // No name is at the start of a line: the line of a mapping begins with its address, and newlines in names are
    // escaped.
    lines(smaps)
        .filter_map(|line| line.strip_prefix(b"VmFlags:"))
        .flat_map(|flags| flags.split(|byte| *byte == b' '))
        .any(|word| word == flag.as_bytes())
}

/// A mount: a line of `/proc/PID/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// The mount point.
    pub mount_point: PathBuf,
    /// The type of its file system, such as `cgroup2`.
    pub fs_type: &'a [u8],
    /// Options of its file system, separated by commas.
    pub super_options: &'a [u8],
}

impl Mount<'_> {
    /// Returns `true` if its file system has this option.
    pub fn has_super_option(&self, option: &str) -> bool {
        let mut options = self.super_options.split(|byte| *byte == b',');
        options.any(|there| there == option.as_bytes())
    }
}

/// Returns the mounts in a `/proc/PID/mountinfo` (`proc_pid_mountinfo(5)`).
pub fn mounts(mountinfo: &[u8]) -> impl Iterator<Item = Result<Mount<'_>, UnreadableLine>> {
    lines(mountinfo).map(|line| mount(line).ok_or_else(|| UnreadableLine::of(line)))
}

/// `id parent major:minor root mount_point options`, zero or more optional fields, `- fs_type source super_options`.
fn mount(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mount_point = fields.nth(4)?;
    let _options = fields.next()?;
    fields.find(|field| *field == b"-")?;
    let fs_type = fields.next()?;
    let _source = fields.next()?;
    Some(Mount {
        mount_point: OsString::from_vec(unescape(mount_point)).into(),
        fs_type,
        super_options: fields.next()?,
    })
}

/// Decodes `\ooo` as the byte with this octal number. Other backslashes stay.
fn unescape(mut escaped: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(escaped.len());
    while let Some((first, rest)) = escaped.split_first() {
        let octal = rest.get(..3).filter(|_| *first == b'\\');
        let byte = octal.and_then(|digits| number(digits, 8));
        if let Some(byte) = byte.and_then(|byte| u8::try_from(byte).ok()) {
            bytes.push(byte);
            escaped = rest.get(3..).unwrap_or_default();
        } else {
            bytes.push(*first);
            escaped = rest;
        }
    }
    bytes
}

/// A cgroup of a process: a line of `/proc/PID/cgroup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup<'a> {
    /// The number of its hierarchy; 0 for that of version 2.
    pub hierarchy: u64,
    /// Its controllers, separated by commas; none in version 2.
    pub controllers: &'a [u8],
    /// Its path in its hierarchy.
    pub path: &'a Path,
}

impl Cgroup<'_> {
    /// Returns `true` if it has this controller (version 1).
    pub fn has_controller(&self, controller: &str) -> bool {
        let mut controllers = self.controllers.split(|byte| *byte == b',');
        controllers.any(|there| there == controller.as_bytes())
    }
}

/// Returns the cgroups in a `/proc/PID/cgroup` (`cgroups(7)`).
pub fn cgroups(cgroup: &[u8]) -> impl Iterator<Item = Result<Cgroup<'_>, UnreadableLine>> {
    lines(cgroup).map(|line| cgroup_of(line).ok_or_else(|| UnreadableLine::of(line)))
}

/// `hierarchy:controllers:path`
fn cgroup_of(line: &[u8]) -> Option<Cgroup<'_>> {
    let mut fields = line.splitn(3, |byte| *byte == b':');
    Some(Cgroup {
        hierarchy: number(fields.next()?, 10)?,
        controllers: fields.next()?,
        path: Path::new(std::ffi::OsStr::from_bytes(fields.next()?)),
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

fn split_once(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let mut halves = bytes.splitn(2, |byte| *byte == at);
    Some((halves.next()?, halves.next()?))
}

/// Parses digits only: no sign and no space.
fn number(digits: &[u8], radix: u32) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    let only_digits = text.chars().all(|digit| digit.is_digit(radix));
    u64::from_str_radix(text, radix).ok().filter(|_| only_digits)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mapping_is_read_whatever_its_name_is() {
        let text = b"7f0000000000-7f0000200000 rw-p 00001000 fe:10 4711                       /SYSV\n\
            7f0000200000-7f0000201000 r--s 00000000 00:2a 18446744073709551615       /a \xff\\012b  \n\
            7f0000201000-7f0000202000 rw-p 00000000 00:00 0 \n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let read: Vec<_> = mappings(text).map(Result::unwrap).collect();
        assert_eq!(
            read[0],
            Mapping {
                start: 0x7f00_0000_0000,
                end: 0x7f00_0020_0000,
                offset: 0x1000,
                device: (0xfe, 0x10),
                inode: 4711,
                path: b"/SYSV",
            }
        );
        assert_eq!((read[1].device, read[1].inode), ((0, 0x2a), u64::MAX));
        assert_eq!(read[1].path, b"/a \xff\\012b  ");
        assert_eq!(read[2].path, b"");
        assert_eq!(read[3].path, b"[vsyscall]");
        assert_eq!(read.len(), 4);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_told_and_hides_no_other() {
        for bad in [
            &b"x"[..],
            b"1-2 r--p 0 1:2",
            b"1-2 r--p 0 1:2 ",
            b"12 r--p 0 1:2 3 /a",
            b"+1-2 r--p 0 1:2 3 /a",
            b"1-2 r--p 0 100000000:2 3 /a",
            b"1-2 r--p 0 1:2 18446744073709551616 /a",
        ] {
            let text = [bad, b"\n1-2 r--p 0 1:2 3 /a\n"].concat();
            let read: Vec<_> = mappings(&text).collect();
            assert_eq!(read[0], Err(UnreadableLine::of(bad)));
            assert_eq!(read[1].as_ref().unwrap().inode, 3);
        }
    }

    #[test]
    fn a_newline_in_a_path_is_written_as_the_kernel_does() {
        assert_eq!(&*path_in_maps(Path::new("/a\nb\n")), Path::new(r"/a\012b\012"));
        assert_eq!(&*path_in_maps(Path::new(r"/a\012 ")), Path::new(r"/a\012 "));
    }

    #[test]
    fn a_flag_is_found_in_no_name() {
        let smaps = |flags: &str| format!("1-2 r--p 0 1:2 3     /VmFlags: um um\nRss: 4 kB\nVmFlags: {flags} \n");
        assert!(has_flag(smaps("rd um mr").as_bytes(), "um"));
        assert!(!has_flag(smaps("rd mr umm").as_bytes(), "um"));
    }

    #[test]
    fn a_mount_is_read_whatever_its_name_is() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402\xff\\134 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
            29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,memory_recursiveprot\n\
            30 23 0:27 / /x rw - cgroup cgroup rw,memory\n\
            31 23 0:28 / /y rw - tmpfs  rw\n";
        let read: Vec<_> = mounts(text).map(Result::unwrap).collect();
        assert_eq!(read[0].mount_point.as_os_str().as_bytes(), b"/mnt 2\xff\\");
        assert_eq!(read[0].fs_type, b"ext3");
        assert_eq!(read[1].mount_point, Path::new("/sys/fs/cgroup"));
        assert!(!read[1].has_super_option("memory"));
        assert!(read[2].has_super_option("memory"));
        assert_eq!(read[3].super_options, b"rw");
        assert!(mounts(b"36 35 98:0 / /a rw").next().unwrap().is_err());
    }

    #[test]
    fn a_cgroup_is_read_whatever_its_name_is() {
        let text = b"5:cpu,memory:/a:b\n0::/\xff c\n";
        let read: Vec<_> = cgroups(text).map(Result::unwrap).collect();
        assert!(read[0].has_controller("memory") && !read[0].has_controller("mem"));
        assert_eq!(read[0].path, Path::new("/a:b"));
        assert_eq!(
            (read[1].hierarchy, read[1].path.as_os_str().as_bytes()),
            (0, &b"/\xff c"[..])
        );
        assert!(cgroups(b"memory").next().unwrap().is_err());
    }

    #[test]
    fn all_that_this_kernel_says_of_us_can_be_read() {
        let maps = fs::read("/proc/self/maps").unwrap();
        assert!(mappings(&maps).all(|mapping| mapping.is_ok()));
        let mountinfo = fs::read("/proc/self/mountinfo").unwrap();
        assert!(mounts(&mountinfo).all(|mount| mount.is_ok()));
        let cgroup = fs::read("/proc/self/cgroup").unwrap();
        assert!(cgroups(&cgroup).all(|cgroup| cgroup.is_ok()));
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes: Vec<u8>) {
            let _ = (mappings(&bytes).count(), mounts(&bytes).count(), cgroups(&bytes).count(), has_flag(&bytes, "um"));
        }

        #[test]
        fn what_is_written_is_read(start: u64, end: u64, offset: u64, major: u32, minor: u32, inode: u64, name: Vec<u8>) {
            let path = PathBuf::from(OsString::from_vec([b"/", &*name].concat()));
            let written = path_in_maps(&path);
            let mut line = format!("{start:x}-{end:x} r--p {offset:08x} {major:02x}:{minor:02x} {inode}      ").into_bytes();
            line.extend(written.as_os_str().as_bytes());
            line.push(b'\n');
            let read: Vec<_> = mappings(&line).collect();
            let expected = Mapping { start, end, offset, device: (major, minor), inode, path: written.as_os_str().as_bytes() };
            prop_assert_eq!(read, [Ok(expected)]);
        }

        #[test]
        fn what_was_escaped_is_unescaped(name: Vec<u8>) {
            let escape = |byte: &u8| match byte {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{byte:03o}").into_bytes(),
                byte => vec![*byte],
            };
            let escaped: Vec<u8> = name.iter().flat_map(escape).collect();
            prop_assert_eq!(unescape(&escaped), name);
        }
    }
}
