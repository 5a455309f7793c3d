//! The version of Firecracker, and whether its forks can be served.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::Command;

use super::finding::Finding;
use crate::firecracker::{Version, version};

/// The first version that sends the page size to a page server. A fork without it is refused.
const NEEDED: Version = Version(1, 7, 0);

pub(super) fn probe(program: &Path) -> Finding {
    judge(program, version(Command::new(program)))
}

fn judge(program: &Path, version: io::Result<Option<Version>>) -> Finding {
    let check = "firecracker";
    let shown = program.display();
    let fix = "name the binary with --firecracker PATH, or install Firecracker 1.12 or newer";
    let version = match version {
        Ok(version) => version,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Finding::warn(check, format!("{shown} is not found"), fix);
        }
        Err(error) => return Finding::warn(check, format!("{shown} --version: {error}"), fix),
    };
    match version {
        None => Finding::warn(
            check,
            format!("{shown} --version does not answer like Firecracker"),
            fix,
        ),
        Some(version) if version < NEEDED => Finding::fail(
            check,
            format!("{shown} is {version}: it does not send the page size to a page server, so its forks are refused"),
            format!("install Firecracker {NEEDED} or newer, or restore with its File backend"),
        ),
        Some(version) => Finding::ok(check, format!("{shown} is {version}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::*;

    fn judged(version: Option<Version>) -> Finding {
        judge("firecracker".as_ref(), Ok(version))
    }

    #[test]
    fn an_old_firecracker_fails_and_none_is_warned_of() {
        assert_eq!(
            judged(Some(Version(1, 12, 1))).parts(),
            (Status::Ok, "firecracker is 1.12.1", "")
        );
        assert_eq!(judged(Some(Version(1, 6, 9))).status(), Status::Fail);
        assert_eq!(judged(Some(Version(1, 7, 0))).status(), Status::Ok);
        let missing = probe("/no/such/firecracker".as_ref());
        assert_eq!(missing.status(), Status::Warn);
        assert_eq!(missing.parts().1, "/no/such/firecracker is not found");
        let denied = probe("/dev/null".as_ref());
        assert_eq!(denied.status(), Status::Warn);
        assert!(denied.parts().1.starts_with("/dev/null --version: Permission denied"));
    }

    #[test]
    fn a_stranger_is_warned_of() {
        let finding = judged(None);
        let (status, found, _) = finding.parts();
        assert_eq!(status, Status::Warn);
        assert_eq!(found, "firecracker --version does not answer like Firecracker");
    }
}
