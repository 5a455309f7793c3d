//! The memory limit of the cgroups we are in.

use std::path::PathBuf;

use indicatif::BinaryBytes;
use pagecast::cgroup::MemoryCgroup;

use super::finding::Finding;
use super::memory::LITTLE;

/// A cgroup that has a limit, in bytes.
struct Limited {
    folder: PathBuf,
    limit: u64,
    available: u64,
}

pub(super) fn probe() -> Finding {
    let limited = MemoryCgroup::own().into_iter().filter_map(|cgroup| {
        Some(Limited {
            folder: cgroup.folder().to_owned(),
            limit: cgroup.limit()?,
            available: cgroup.available()?,
        })
    });
    limit(limited)
}

/// What the tightest of them means.
fn limit(limited: impl Iterator<Item = Limited>) -> Finding {
    let check = "cgroup_memory";
    let Some(tightest) = limited.min_by_key(|cgroup| cgroup.available) else {
        return Finding::ok(
            check,
            "no limit here; a fork's pages are charged to the cgroup of its VMM",
        );
    };
    let found = format!(
        "{} left of {} in {}",
        BinaryBytes(tightest.available),
        BinaryBytes(tightest.limit),
        tightest.folder.display()
    );
    if tightest.available < LITTLE {
        return Finding::warn(
            check,
            found,
            "raise its memory.max (MemoryMax= of a systemd unit), or start the VMMs in another cgroup: their pages are \
             charged there",
        );
    }
    Finding::ok(check, found)
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
        assert_eq!(limit(std::iter::empty()).status(), Status::Ok);
    }

    #[test]
    fn the_tightest_limit_counts() {
        let wide = || limited("/sys/fs/cgroup", 8 << 30, 4 << 30);
        let finding = limit([limited("/sys/fs/cgroup/a", 4 << 30, 2 << 30), wide()].into_iter());
        assert_eq!(
            finding.parts(),
            (Status::Ok, "2.00 GiB left of 4.00 GiB in /sys/fs/cgroup/a", "")
        );
        let tight = limit([wide(), limited("/sys/fs/cgroup/b", 1 << 30, 1 << 20)].into_iter());
        assert_eq!(tight.status(), Status::Warn);
        assert!(tight.parts().1.contains("/sys/fs/cgroup/b"));
        assert!(tight.parts().2.contains("memory.max"));
    }
}
