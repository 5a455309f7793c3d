//! The limits of this process's cgroups: memory and hugepages.

use std::path::PathBuf;

use indicatif::BinaryBytes;
use pagecast::cgroup::{HugetlbCgroup, MemoryCgroup};

use super::finding::Finding;
use super::memory::LITTLE;

/// A cgroup that has a limit, in bytes.
struct Limited {
    folder: PathBuf,
    limit: u64,
    available: u64,
}

pub(super) fn probe() -> [Finding; 2] {
    [memory(), hugepages()]
}

fn hugepages() -> Finding {
    let limited = HugetlbCgroup::own().into_iter().filter_map(|cgroup| {
        Some(Limited {
            folder: cgroup.folder().to_owned(),
            limit: cgroup.limit()?,
            available: cgroup.available()?,
        })
    });
    HUGEPAGES.of(limited)
}

fn memory() -> Finding {
    let limited = MemoryCgroup::own().into_iter().filter_map(|cgroup| {
        Some(Limited {
            folder: cgroup.folder().to_owned(),
            limit: cgroup.limit()?,
            available: cgroup.available()?,
        })
    });
    MEMORY.of(limited)
}

/// Texts for the limits of one controller.
struct Meaning {
    check: &'static str,
    without_limit: &'static str,
    /// The word for the unused part of the limit.
    left: &'static str,
    fix: &'static str,
}

const HUGEPAGES: Meaning = Meaning {
    check: "cgroup_hugepages",
    without_limit: "no limit here; the hugepages of forks with uffd are charged to the cgroup of the page server, not to that of \
                    their VMMs",
    left: "of hugepages left",
    fix: "raise its hugetlb.2MB.max (version 1: hugetlb.2MB.limit_in_bytes): the hugepages of forks with uffd are charged to \
          the page server, not to their VMMs",
};

const MEMORY: Meaning = Meaning {
    check: "cgroup_memory",
    without_limit: "no limit; a fork's pages are charged to the cgroup of its VMM",
    left: "left",
    fix: "raise its memory.max (MemoryMax= of a systemd unit), or start the VMMs in another cgroup: their pages are \
          charged there",
};

impl Meaning {
    /// The finding for the smallest available amount.
    fn of(&self, limited: impl Iterator<Item = Limited>) -> Finding {
        let Some(tightest) = limited.min_by_key(|cgroup| cgroup.available) else {
            return Finding::ok(self.check, self.without_limit);
        };
        let found = format!(
            "{} {} of {} in {}",
            BinaryBytes(tightest.available),
            self.left,
            BinaryBytes(tightest.limit),
            tightest.folder.display()
        );
        if tightest.available < LITTLE {
            return Finding::warn(self.check, found, self.fix);
        }
        Finding::ok(self.check, found)
    }
}
#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::*;

    fn limited(folder: &str, limit: u64, available: u64) -> Limited {
        Limited {
            folder: folder.into(),
            limit,
            available,
        }
    }

    #[test]
    fn no_limit_is_fine() {
        assert_eq!(MEMORY.of(std::iter::empty()).status(), Status::Ok);
        let hugepages = HUGEPAGES.of(std::iter::empty());
        assert_eq!(hugepages.status(), Status::Ok);
        assert!(hugepages.parts().1.contains("the page server"));
    }

    #[test]
    fn a_tight_limit_of_hugepages_is_warned_of() {
        let tight = HUGEPAGES.of([limited("/sys/fs/cgroup/b", 1 << 30, 1 << 21)].into_iter());
        assert_eq!(tight.status(), Status::Warn);
        assert!(tight.parts().1.contains("/sys/fs/cgroup/b"));
        assert!(tight.parts().2.contains("hugetlb.2MB.max"));
        let wide = HUGEPAGES.of([limited("/sys/fs/cgroup/b", 2 << 30, 1 << 30)].into_iter());
        assert_eq!(wide.status(), Status::Ok);
    }

    #[test]
    fn the_tightest_limit_counts() {
        let wide = || limited("/sys/fs/cgroup", 8 << 30, 4 << 30);
        let finding = MEMORY.of([limited("/sys/fs/cgroup/a", 4 << 30, 2 << 30), wide()].into_iter());
        assert_eq!(
            finding.parts(),
            (Status::Ok, "2.00 GiB left of 4.00 GiB in /sys/fs/cgroup/a", "")
        );
        let tight = MEMORY.of([wide(), limited("/sys/fs/cgroup/b", 1 << 30, 1 << 20)].into_iter());
        assert_eq!(tight.status(), Status::Warn);
        assert!(tight.parts().1.contains("/sys/fs/cgroup/b"));
        assert!(tight.parts().2.contains("memory.max"));
    }
}
