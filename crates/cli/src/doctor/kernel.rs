//! The kernel: its version, and its pidfds.

use pagecast_uffd::{Errno, PidFd};

use super::finding::Finding;
use super::host::{Host, unknown};

const OSRELEASE: &str = "/proc/sys/kernel/osrelease";

/// Major, minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

/// The first version with all that pagecast needs: `pidfd_open`, and before that `EVENT_REMOVE` (4.11) and `RWF_NOWAIT`
/// for files (4.14).
const NEEDED: Version = Version(5, 3);

/// What is missing in older versions, each with a way around it.
const BETTER: [(Version, &str); 3] = [
    (
        Version(6, 5),
        "a VMM is known by its process ID and owner only (SO_PEERPIDFD: 6.5)",
    ),
    (
        Version(6, 10),
        "a hostile VMM can block a worker (RWF_NOWAIT of a userfaultfd: 6.10)",
    ),
    (
        Version(6, 13),
        "a template written within 4 ms of being opened can go unnoticed (fine time stamps: 6.13)",
    ),
];

pub(super) fn probe(host: &Host) -> [Finding; 2] {
    let version = match host.text(OSRELEASE) {
        Ok(release) => version(&release),
        Err(error) => unknown("kernel", OSRELEASE, &error),
    };
    [version, pidfd(open_own())]
}

fn version(release: &str) -> Finding {
    let check = "kernel";
    let Some(version) = Version::parse(release) else {
        return Finding::warn(
            check,
            format!("Linux with the unknown version {release:?}"),
            format!("make sure that it is {NEEDED} or newer"),
        );
    };
    if version < NEEDED {
        return Finding::fail(
            check,
            format!("Linux {release}: a VMM that cannot be served cannot be killed by pidfd (pidfd_open: {NEEDED})"),
            format!("use Linux {NEEDED} at least, best 6.13 or newer"),
        );
    }
    let missing: Vec<&str> = BETTER
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|(_, what)| *what)
        .collect();
    if missing.is_empty() {
        return Finding::ok(check, format!("Linux {release}"));
    }
    Finding::warn(
        check,
        format!("Linux {release}: {}", missing.join("; ")),
        "use Linux 6.13 or newer, unless you trust your VMMs and no process writes your templates",
    )
}

impl Version {
    /// Parses `6.1.0-18-amd64`, `6.18-rc1`, …
    fn parse(release: &str) -> Option<Self> {
        let mut parts = release.split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?;
        let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
        Some(Self(major, minor[..digits].parse().ok()?))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Opens a pidfd of this process, as the server opens one of each VMM.
fn open_own() -> Result<(), Errno> {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    PidFd::open(own)?.may_kill()
}

fn pidfd(opened: Result<(), Errno>) -> Finding {
    match opened {
        Ok(()) => Finding::ok("pidfd", "VMMs can be watched and killed by pidfd"),
        Err(errno) => Finding::fail(
            "pidfd",
            format!("no pidfd can be opened: {errno}"),
            "allow pidfd_open and pidfd_send_signal (Linux 5.3): a seccomp profile of a container may forbid them",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::super::host::made_up;
    use super::*;

    #[test]
    fn versions_of_distributions_are_understood() {
        for (release, version) in [
            ("6.18.44-fc", Some(Version(6, 18))),
            ("6.1.0-18-amd64", Some(Version(6, 1))),
            ("5.10.0-rc1+", Some(Version(5, 10))),
            ("6.18-rc1", Some(Version(6, 18))),
            ("4.18.0-513.el8.x86_64", Some(Version(4, 18))),
            ("6", None),
            ("", None),
            ("six.one", None),
            ("6.x", None),
            ("6.99999999999999999999", None),
        ] {
            assert_eq!(Version::parse(release), version, "{release}");
        }
    }

    #[test]
    fn old_kernels_fail_and_middling_ones_say_what_they_lack() {
        let status = |release| version(release).status();
        assert_eq!(status("4.18.0"), Status::Fail);
        assert_eq!(status("5.2.99"), Status::Fail);
        assert_eq!(status("6.13.0"), Status::Ok);
        assert_eq!(status("7.0.0"), Status::Ok);
        assert_eq!(status("Hurd"), Status::Warn);
        let lts = version("6.1.0-18-amd64");
        let (status, found, _) = lts.parts();
        assert_eq!(status, Status::Warn);
        for feature in ["6.5", "6.10", "6.13"] {
            assert!(found.contains(feature), "{found}");
        }
        let newer = version("6.12.1");
        let (status, found, _) = newer.parts();
        assert_eq!(status, Status::Warn);
        assert!(found.contains("6.13") && !found.contains("6.10"), "{found}");
    }

    #[test]
    fn a_host_without_proc_cannot_tell() {
        let (host, _folder) = made_up(&[]);
        let [kernel, _] = probe(&host);
        let (status, found, fix) = kernel.parts();
        assert_eq!(status, Status::Warn);
        assert!(
            found.starts_with("cannot tell: /proc/sys/kernel/osrelease: "),
            "{found}"
        );
        assert!(fix.contains("mount /proc"), "{fix}");
    }

    #[test]
    fn without_pidfds_it_fails() {
        assert_eq!(pidfd(open_own()).status(), Status::Ok);
        let denied = pidfd(Err(Errno::new(rustix::io::Errno::PERM.raw_os_error())));
        let (status, found, fix) = denied.parts();
        assert_eq!(status, Status::Fail);
        assert!(
            found.contains("not permitted") && fix.contains("seccomp"),
            "{found}: {fix}"
        );
    }
}
