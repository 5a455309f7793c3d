//! File leases (`fcntl(2)`): the kernel notifies the holder before a process opens a template for writing.

use super::finding::Finding;
use super::host::{Host, unknown};

const ENABLE: &str = "/proc/sys/fs/leases-enable";
const BREAK_TIME: &str = "/proc/sys/fs/lease-break-time";

/// Less time than this, in seconds, is short for ending the forks of a template.
const SHORT: u64 = 10;

pub(super) fn probe(host: &Host) -> [Finding; 2] {
    [enabled(host), break_time(host)]
}

fn enabled(host: &Host) -> Finding {
    let check = "leases";
    match host.number(ENABLE) {
        Ok(0) => Finding::warn(
            check,
            "fs.leases-enable is 0: writes to a template cannot be held off, only noticed",
            "sysctl -w fs.leases-enable=1",
        ),
        Ok(_) => Finding::ok(check, "files can be leased"),
        Err(error) => unknown(check, ENABLE, &error),
    }
}

fn break_time(host: &Host) -> Finding {
    let check = "lease_break_time";
    match host.number(BREAK_TIME) {
        Ok(0) => Finding::ok(check, "the kernel never breaks a lease by force"),
        Ok(seconds) if seconds < SHORT => Finding::warn(
            check,
            format!("the kernel breaks a lease after {seconds} s: little time to end the forks of a template"),
            "sysctl -w fs.lease-break-time=45",
        ),
        Ok(seconds) => Finding::ok(check, format!("the kernel breaks a lease after {seconds} s")),
        Err(error) => unknown(check, BREAK_TIME, &error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::super::host::made_up;
    use super::*;

    #[test]
    fn leases_should_be_on_and_last() {
        let look = |enable: &str, seconds: &str| {
            let (host, _folder) = made_up(&[(ENABLE, enable), (BREAK_TIME, seconds)]);
            probe(&host).map(|finding| finding.status())
        };
        assert_eq!(look("1\n", "45\n"), [Status::Ok, Status::Ok]);
        assert_eq!(look("0\n", "5\n"), [Status::Warn, Status::Warn]);
        assert_eq!(look("1\n", "0\n"), [Status::Ok, Status::Ok]);
        assert_eq!(look("?\n", "-1\n"), [Status::Warn, Status::Warn]);
    }
}
