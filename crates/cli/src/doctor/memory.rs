//! Memory: its size, its huge pages, and the kernel's overcommit mode.

use std::io;

use indicatif::BinaryBytes;

use super::finding::Finding;
use super::host::{Host, unknown};

const MEMINFO: &str = "/proc/meminfo";
const HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";

/// A fork or two use up less memory than this.
pub(super) const LITTLE: u64 = 512 << 20;

pub(super) fn probe(host: &Host) -> [Finding; 4] {
    [memory(host), hugepages(host), thp(host), overcommit(host)]
}

fn memory(host: &Host) -> Finding {
    let check = "memory";
    let text = match host.text(MEMINFO) {
        Ok(text) => text,
        Err(error) => return unknown(check, MEMINFO, &error),
    };
    let (Some(available), Some(total)) = (field(&text, "MemAvailable:"), field(&text, "MemTotal:")) else {
        let error = io::Error::other("neither MemAvailable nor MemTotal");
        return unknown(check, MEMINFO, &error);
    };
    let found = format!("{} available of {}", BinaryBytes(available), BinaryBytes(total));
    if available < LITTLE {
        return Finding::warn(
            check,
            found,
            "free or add memory: each fork takes the pages it touches (uffd) or writes (file)",
        );
    }
    Finding::ok(check, found)
}

/// The number of bytes in the line `Name:  123 kB`.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

fn hugepages(host: &Host) -> Finding {
    let check = "hugepages";
    let only = "only guests with 2 MiB pages need them";
    if !host.path(HUGEPAGES).is_dir() {
        return Finding::warn(
            check,
            format!("this kernel has no pages of 2 MiB; {only}"),
            "use a kernel with CONFIG_HUGETLBFS if you have such guests",
        );
    }
    let number = |name: &str| {
        let path = format!("{HUGEPAGES}/{name}");
        host.number(&path).map_err(|error| unknown(check, path, &error))
    };
    let counts = || -> Result<_, Finding> {
        Ok((
            number("free_hugepages")?,
            number("resv_hugepages")?,
            number("nr_hugepages")?,
            number("nr_overcommit_hugepages")?,
            number("surplus_hugepages")?,
        ))
    };
    let (free, reserved, all, overcommit, surplus) = match counts() {
        Ok(counts) => counts,
        Err(finding) => return finding,
    };
    let may_be_added = overcommit.saturating_sub(surplus);
    // Reserved pages may be of either kind.
    let added_left = may_be_added.saturating_sub(reserved.saturating_sub(free));
    let free = free.saturating_sub(reserved);
    let size = BinaryBytes(free.saturating_mul(2 << 20));
    let added = match added_left {
        0 => String::new(),
        _ => format!(", and the kernel may add {added_left} (vm.nr_overcommit_hugepages) as far as there is memory"),
    };
    let found = format!("{free} of {all} pages of 2 MiB are free ({size}){added}");
    if free == 0 && added_left == 0 {
        return Finding::warn(
            check,
            format!("{found}; {only}"),
            "sysctl -w vm.nr_hugepages=N, where N is half the MiB that all such forks have together",
        );
    }
    Finding::ok(check, found)
}

fn thp(host: &Host) -> Finding {
    let check = "thp";
    let text = match host.text(THP) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && host.path("/sys/kernel/mm").is_dir() => {
            return Finding::ok(check, "this kernel has no transparent hugepages");
        }
        Err(error) => return unknown(check, THP, &error),
    };
    match chosen(&text) {
        Some("always") => Finding::warn(
            check,
            "transparent hugepages are always used: a complete fork may get 2 MiB for each page it has",
            format!("echo madvise > {THP}"),
        ),
        Some(mode @ ("madvise" | "never")) => Finding::ok(check, format!("transparent hugepages: {mode}")),
        _ => unknown(check, THP, &io::Error::other(format!("{text:?} names no known mode"))),
    }
}

/// The word in brackets of `always [madvise] never`.
fn chosen(modes: &str) -> Option<&str> {
    modes
        .split_whitespace()
        .find_map(|mode| mode.strip_prefix('[')?.strip_suffix(']'))
}

fn overcommit(host: &Host) -> Finding {
    let check = "overcommit";
    match host.number(OVERCOMMIT) {
        Ok(0) => Finding::ok(check, "vm.overcommit_memory is 0: only obvious excess is refused"),
        Ok(1) => Finding::ok(check, "vm.overcommit_memory is 1: nothing is refused"),
        Ok(2) => Finding::warn(
            check,
            "vm.overcommit_memory is 2: each fork counts with all of its memory, shared and untouched pages included",
            "sysctl -w vm.overcommit_memory=0",
        ),
        Ok(mode) => unknown(check, OVERCOMMIT, &io::Error::other(format!("{mode} is no known mode"))),
        Err(error) => unknown(check, OVERCOMMIT, &error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::super::host::made_up;
    use super::*;

    #[test]
    fn memory_that_is_available_counts() {
        let look = |text: &str| {
            let (host, _folder) = made_up(&[(MEMINFO, text)]);
            memory(&host)
        };
        let much = look("MemTotal:       24684096 kB\nMemFree:  1 kB\nMemAvailable:   16777216 kB\n");
        assert_eq!(much.parts(), (Status::Ok, "16.00 GiB available of 23.54 GiB", ""));
        let little = look("MemTotal:       1048576 kB\nMemAvailable:   262144 kB\n");
        assert_eq!(little.parts().0, Status::Warn);
        assert_eq!(little.parts().1, "256.00 MiB available of 1.00 GiB");
        for text in [
            "",
            "MemTotal: x kB\nMemAvailable: 1 kB",
            "MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB",
        ] {
            assert!(look(text).parts().1.starts_with("cannot tell"), "{text}");
        }
    }

    #[test]
    fn hugepages_are_free_where_nobody_reserved_them() {
        let look_at = |free: &str, reserved: &str, overcommit: &str| {
            let path = |name: &str| format!("{HUGEPAGES}/{name}");
            let (host, _folder) = made_up(&[
                (&path("nr_hugepages"), "512\n"),
                (&path("free_hugepages"), free),
                (&path("resv_hugepages"), reserved),
                (&path("nr_overcommit_hugepages"), overcommit),
                (&path("surplus_hugepages"), "2\n"),
            ]);
            hugepages(&host)
        };
        let look = |free: &str, reserved: &str| look_at(free, reserved, "0\n");
        let more = look_at("0\n", "0\n", "10\n");
        assert_eq!(more.status(), Status::Ok);
        assert!(more.parts().1.contains("the kernel may add 8"), "{:?}", more.parts());
        assert_eq!(look_at("0\n", "8\n", "10\n").status(), Status::Warn);
        let some = look("100\n", "36\n");
        assert_eq!(
            some.parts(),
            (Status::Ok, "64 of 512 pages of 2 MiB are free (128.00 MiB)", "")
        );
        let none = look("36\n", "36\n");
        assert_eq!(none.status(), Status::Warn);
        assert!(none.parts().1.contains("only guests with 2 MiB pages"));
        assert!(none.parts().2.contains("vm.nr_hugepages"));
        assert!(look("many", "0").parts().1.starts_with("cannot tell"));
        let (without, _folder) = made_up(&[]);
        assert_eq!(hugepages(&without).status(), Status::Warn);
    }

    #[test]
    fn transparent_hugepages_should_wait_to_be_asked_for() {
        let look = |text: &str| {
            let (host, _folder) = made_up(&[(THP, text)]);
            thp(&host)
        };
        assert_eq!(look("always [madvise] never\n").status(), Status::Ok);
        assert_eq!(look("always madvise [never]\n").status(), Status::Ok);
        let always = look("[always] madvise never\n");
        assert_eq!(always.status(), Status::Warn);
        assert!(always.parts().2.starts_with("echo madvise > "));
        for text in ["", "always madvise never", "[sometimes]"] {
            assert!(look(text).parts().1.starts_with("cannot tell"), "{text}");
        }
        let (without, _folder) = made_up(&[("/sys/kernel/mm/ksm/run", "0")]);
        assert_eq!(thp(&without).status(), Status::Ok);
        let (without_sys, _folder) = made_up(&[]);
        assert_eq!(thp(&without_sys).status(), Status::Warn);
    }

    #[test]
    fn strict_overcommit_is_warned_of() {
        let look = |text: &str| {
            let (host, _folder) = made_up(&[(OVERCOMMIT, text)]);
            overcommit(&host)
        };
        assert_eq!(look("0\n").status(), Status::Ok);
        assert_eq!(look("1\n").status(), Status::Ok);
        assert_eq!(look("2\n").parts().2, "sysctl -w vm.overcommit_memory=0");
        assert!(look("3\n").parts().1.starts_with("cannot tell"));
        assert!(look("\n").parts().1.starts_with("cannot tell"));
    }
}
