//! Devices that must exist and be open to this user.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use super::finding::Finding;
use super::host::Host;

const KVM: &str = "/dev/kvm";
const FUSE: &str = "/dev/fuse";

/// Opens a device for reading and writing, as its users do, and closes it again.
///
/// # Errors
///
/// The device cannot be opened, or the path is no device.
pub(super) fn open(path: &Path) -> io::Result<()> {
    // No other file is opened: opening a FIFO would wait for its other end.
    if !path.metadata()?.file_type().is_char_device() {
        return Err(io::Error::other("this is no device"));
    }
    File::options().read(true).write(true).open(path).map(drop)
}

pub(super) fn probe_kvm(host: &Host) -> Finding {
    kvm(open(&host.path(KVM)))
}

pub(super) fn probe_fuse(host: &Host) -> Finding {
    fuse(open(&host.path(FUSE)))
}

fn kvm(opened: io::Result<()>) -> Finding {
    let check = "kvm";
    match opened {
        Ok(()) => Finding::ok(check, format!("{KVM} opens")),
        Err(error) => Finding::fail(
            check,
            format!("{KVM}: {error}"),
            match error.kind() {
                ErrorKind::NotFound => {
                    "load kvm_intel or kvm_amd; in a VM, switch nested virtualisation on; in a container, pass the device on"
                        .to_owned()
                }
                ErrorKind::PermissionDenied => give_access(KVM),
                _ => "switch virtualisation on in the firmware, and look for kvm in the kernel's log".to_owned(),
            },
        ),
    }
}

fn fuse(opened: io::Result<()>) -> Finding {
    let check = "fuse";
    match opened {
        Ok(()) => Finding::ok(check, format!("{FUSE} opens")),
        Err(error) => Finding::warn(
            check,
            format!("{FUSE}: {error}; this version does not need it, lazily mounted templates will"),
            match error.kind() {
                ErrorKind::NotFound => "modprobe fuse; in a container, pass the device on".to_owned(),
                ErrorKind::PermissionDenied => give_access(FUSE),
                _ => "look for fuse in the kernel's log".to_owned(),
            },
        ),
    }
}

/// The fix that lets this user open a device.
pub(super) fn give_access(device: &str) -> String {
    let uid = rustix::process::geteuid().as_raw();
    format!("setfacl -m u:{uid}:rw {device}; in a container, allow the device in its cgroup")
}

#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::super::host::made_up;
    use super::*;

    #[test]
    fn a_device_opens_and_nothing_else_does() {
        let (host, folder) = made_up(&[("/dev/file", "")]);
        std::os::unix::fs::symlink("/dev/null", folder.path().join("dev/null")).unwrap();
        open(&host.path("/dev/null")).unwrap();
        assert_eq!(
            open(&host.path("/dev/file")).unwrap_err().to_string(),
            "this is no device"
        );
        assert_eq!(open(&host.path("/dev/kvm")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn every_way_not_to_have_kvm_fails_with_its_own_fix() {
        assert_eq!(kvm(Ok(())).status(), Status::Ok);
        for (kind, word) in [
            (ErrorKind::NotFound, "nested"),
            (ErrorKind::PermissionDenied, "setfacl"),
            (ErrorKind::Other, "firmware"),
        ] {
            let finding = kvm(Err(kind.into()));
            let (status, _, fix) = finding.parts();
            assert_eq!(status, Status::Fail);
            assert!(fix.contains(word), "{fix}");
        }
    }

    #[test]
    fn every_way_not_to_have_fuse_warns_with_its_own_fix() {
        assert_eq!(fuse(Ok(())).status(), Status::Ok);
        for (kind, word) in [
            (ErrorKind::NotFound, "modprobe"),
            (ErrorKind::PermissionDenied, "setfacl"),
            (ErrorKind::Other, "log"),
        ] {
            let finding = fuse(Err(kind.into()));
            let (status, _, fix) = finding.parts();
            assert_eq!(status, Status::Warn);
            assert!(fix.contains(word), "{fix}");
        }
    }

    #[test]
    fn a_made_up_host_without_devices_says_so() {
        let (host, _folder) = made_up(&[]);
        assert_eq!(probe_kvm(&host).status(), Status::Fail);
        assert_eq!(probe_fuse(&host).status(), Status::Warn);
    }
}
