//! Whether a VMM can create the userfaultfd that it sends to the page server.

use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;

use pagecast_uffd::{CreateError, Features, Uffd, UffdOptions};

use super::device;
use super::finding::Finding;
use super::host::{Host, unknown};

const DEVICE: &str = "/dev/userfaultfd";
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// Creates a userfaultfd with these features, and closes it again.
type Create = fn(Features) -> Result<(), CreateError>;

pub(super) fn probe(host: &Host) -> [Finding; 3] {
    let device = device::open(&host.path(DEVICE));
    [creation(&device, create), features(create), others(host)]
}

fn create(features: Features) -> Result<(), CreateError> {
    let options = UffdOptions {
        features,
        nonblocking: true,
    };
    Uffd::create(options).map(drop)
}

/// Creates one like Firecracker: from the device if it exists, else by the system call. A device that does not open is a
/// failure, even if the system call would succeed.
fn creation(device: &io::Result<()>, create: Create) -> Finding {
    let check = "userfaultfd";
    let way = match device {
        Ok(()) => "through /dev/userfaultfd",
        Err(error) if error.kind() == ErrorKind::NotFound => "by system call",
        Err(error) => {
            return Finding::fail(
                check,
                format!("{DEVICE}: {error}; Firecracker does not try the system call if the device exists"),
                device::give_access(DEVICE),
            );
        }
    };
    match create(Features::empty()) {
        Ok(()) => Finding::ok(check, format!("created {way}, as a VMM of this user will")),
        Err(CreateError::Unavailable { syscall, .. }) => Finding::fail(
            check,
            format!("not created {way}: {syscall}"),
            "sysctl -w vm.unprivileged_userfaultfd=1; a kernel without CONFIG_USERFAULTFD or a seccomp profile that \
             forbids userfaultfd must be changed",
        ),
        Err(error) => Finding::fail(check, format!("not created: {error}"), "use a kernel with userfaultfd"),
    }
}

/// The features that Firecracker requests, and those that guests with 2 MiB pages need.
fn features(create: Create) -> Finding {
    let check = "userfaultfd_features";
    match create(Features::EVENT_REMOVE) {
        Ok(()) => {}
        Err(CreateError::Features { source, .. }) => {
            return Finding::fail(
                check,
                format!("EVENT_REMOVE, which Firecracker requests, is missing: {source}"),
                "use Linux 4.11 or newer",
            );
        }
        Err(_) => {
            return Finding::fail(
                check,
                "unknown: no userfaultfd could be created",
                "fix userfaultfd first",
            );
        }
    }
    match create(Features::EVENT_REMOVE | Features::MISSING_HUGETLBFS) {
        Ok(()) => Finding::ok(
            check,
            "EVENT_REMOVE (balloons) and MISSING_HUGETLBFS (guests with 2 MiB pages)",
        ),
        Err(error) => Finding::warn(
            check,
            format!("guests with 2 MiB pages cannot be served: {error}"),
            "use a kernel with CONFIG_HUGETLBFS if you have such guests",
        ),
    }
}

/// Whether VMMs of other users may create one.
fn others(host: &Host) -> Finding {
    let check = "userfaultfd_users";
    match host.path(DEVICE).metadata() {
        Ok(metadata) => {
            let (mode, uid, gid) = (metadata.mode() & 0o777, metadata.uid(), metadata.gid());
            let found = if mode & 0o006 == 0o006 {
                "every user may".to_owned()
            } else {
                format!(
                    "{DEVICE} has mode {mode:o}, owner {uid}:{gid}: VMMs of other users need access, which Firecracker's \
                     jailer gives them"
                )
            };
            Finding::ok(check, found)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => match host.number(SYSCTL) {
            Ok(0) => Finding::warn(
                check,
                format!(
                    "only those with CAP_SYS_PTRACE may: there is no {DEVICE}, and vm.unprivileged_userfaultfd is 0"
                ),
                "sysctl -w vm.unprivileged_userfaultfd=1, or use Linux 6.1 or newer with /dev/userfaultfd",
            ),
            Ok(_) => Finding::ok(check, "every user may (vm.unprivileged_userfaultfd)"),
            // Before Linux 5.2 every user may.
            Err(error) if error.kind() == ErrorKind::NotFound && host.path("/proc/sys/vm").is_dir() => {
                Finding::ok(check, "every user may")
            }
            Err(error) => unknown(check, SYSCTL, &error),
        },
        Err(error) => unknown(check, DEVICE, &error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use pagecast_uffd::Errno;

    use super::super::finding::Status;
    use super::super::host::made_up;
    use super::*;

    const DENIED: Errno = Errno::new(rustix::io::Errno::PERM.raw_os_error());

    fn works(features: Features) -> Result<(), CreateError> {
        lacking(Features::empty(), features)
    }

    fn refused(_: Features) -> Result<(), CreateError> {
        Err(CreateError::Unavailable {
            device: DENIED,
            syscall: DENIED,
        })
    }

    /// A kernel that lacks any of these.
    fn lacking(missing: Features, features: Features) -> Result<(), CreateError> {
        if features.intersects(missing) {
            let source = DENIED;
            return Err(CreateError::Features { features, source });
        }
        Ok(())
    }

    #[test]
    fn one_is_created_through_the_device_or_where_there_is_none_by_the_system_call() {
        let by_device = creation(&Ok(()), works);
        assert_eq!(by_device.status(), Status::Ok);
        assert!(by_device.parts().1.contains("/dev/userfaultfd"));
        let by_call = creation(&Err(ErrorKind::NotFound.into()), works);
        assert_eq!(by_call.status(), Status::Ok);
        assert!(by_call.parts().1.contains("system call"));
    }

    #[test]
    fn a_device_that_is_closed_to_us_fails_even_where_the_system_call_would_work() {
        let finding = creation(&Err(ErrorKind::PermissionDenied.into()), works);
        let (status, found, fix) = finding.parts();
        assert_eq!(status, Status::Fail);
        assert!(found.contains("does not try the system call"), "{found}");
        assert!(fix.starts_with("setfacl -m u:"), "{fix}");
    }

    #[test]
    fn a_refused_system_call_names_the_sysctl() {
        let finding = creation(&Err(ErrorKind::NotFound.into()), refused);
        let (status, found, fix) = finding.parts();
        assert_eq!(status, Status::Fail);
        assert!(found.contains("not permitted"), "{found}");
        assert!(fix.contains("vm.unprivileged_userfaultfd=1"), "{fix}");
        let finding = creation(&Ok(()), |features| lacking(Features::all(), features));
        assert_eq!(finding.status(), Status::Ok, "no feature was asked for");
    }

    #[test]
    fn missing_features_say_who_needs_them() {
        assert_eq!(features(works).status(), Status::Ok);
        let old = features(|features| lacking(Features::EVENT_REMOVE, features));
        assert_eq!(old.status(), Status::Fail);
        assert!(old.parts().1.contains("EVENT_REMOVE"));
        let small = features(|features| lacking(Features::MISSING_HUGETLBFS, features));
        assert_eq!(small.status(), Status::Warn);
        assert!(small.parts().1.contains("2 MiB"));
        let none = features(refused);
        assert_eq!(none.status(), Status::Fail);
        assert_eq!(none.parts().2, "fix userfaultfd first");
    }

    #[test]
    fn who_else_may_is_said_by_the_device() {
        let (host, _folder) = made_up(&[(DEVICE, "")]);
        let mode = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(host.path(DEVICE), permissions).unwrap();
            others(&host)
        };
        let closed = mode(0o600);
        assert_eq!(closed.status(), Status::Ok);
        assert!(closed.parts().1.contains("mode 600") && closed.parts().1.contains("jailer"));
        assert_eq!(mode(0o666).parts(), (Status::Ok, "every user may", ""));
    }

    #[test]
    fn without_a_device_the_sysctl_says_who_else_may() {
        let with = |text| {
            let (host, _folder) = made_up(&[(SYSCTL, text)]);
            others(&host)
        };
        assert_eq!(with("1\n").status(), Status::Ok);
        let closed = with("0\n");
        assert_eq!(closed.status(), Status::Warn);
        assert!(closed.parts().2.contains("sysctl -w"));
        assert!(with("?\n").parts().1.starts_with("cannot tell"));
        let (before_5_2, _folder) = made_up(&[("/proc/sys/vm/swappiness", "60")]);
        assert_eq!(others(&before_5_2).status(), Status::Ok);
        let (without_proc, _folder) = made_up(&[]);
        assert_eq!(others(&without_proc).status(), Status::Warn);
    }
}
