//! Limits of a process: priority, file descriptors, mappings.

use rustix::process::{Resource, Rlimit};

use super::finding::Finding;
use super::host::{Host, unknown};

const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// File descriptors that the server needs for itself: threads, templates, sockets.
const OWN_FILES: u64 = 64;
/// File descriptors that each fork needs: userfaultfd, socket, pidfd.
const FILES_PER_FORK: u64 = 3;
/// A limit for fewer forks than this is a warning.
const FORKS: u64 = 1000;

/// The kernel's default.
const USUAL_MAPS: u64 = 65_530;

/// How far the nice value of a busy worker is lowered.
const RAISE: i32 = 10;

pub(super) fn probe(host: &Host) -> [Finding; 3] {
    let files = open_files(rustix::process::getrlimit(Resource::Nofile));
    [files, max_map_count(host), priority(raise())]
}

/// Raises the priority of a thread that ends right after that.
fn raise() -> bool {
    let raised = std::thread::spawn(|| {
        let usual = rustix::process::getpriority_process(None)?;
        rustix::process::setpriority_process(None, usual - RAISE)
    });
    raised.join().is_ok_and(|raised| raised.is_ok())
}

fn priority(may_be_raised: bool) -> Finding {
    let check = "priority";
    if may_be_raised {
        return Finding::ok(
            check,
            "threads may raise their priority: many forks at once are served with few context switches",
        );
    }
    Finding::warn(
        check,
        "threads may not raise their priority: many forks at once are served a little slower",
        "start the server with CAP_SYS_NICE, or LimitNICE=-10 in a systemd unit",
    )
}

fn open_files(limit: Rlimit) -> Finding {
    let check = "open_files";
    let show = |limit: Option<u64>| limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    let limits = format!("soft {}, hard {}", show(limit.current), show(limit.maximum));
    // The server raises its soft limit to the hard one.
    let Some(maximum) = limit.maximum else {
        return Finding::ok(check, limits);
    };
    let forks = maximum.saturating_sub(OWN_FILES) / FILES_PER_FORK;
    let found = format!("{limits}: enough for about {forks} forks at once");
    if forks < FORKS {
        return Finding::warn(
            check,
            found,
            "raise the hard limit: LimitNOFILE= of a systemd unit, ulimit -Hn, or /etc/security/limits.conf",
        );
    }
    Finding::ok(check, found)
}

fn max_map_count(host: &Host) -> Finding {
    let check = "max_map_count";
    match host.number(MAX_MAP_COUNT) {
        Ok(count) if count < USUAL_MAPS => Finding::warn(
            check,
            format!("a process may have {count} mappings, fewer than usual: a VMM may need many"),
            format!("sysctl -w vm.max_map_count={USUAL_MAPS}"),
        ),
        Ok(count) => Finding::ok(check, format!("a process may have {count} mappings")),
        Err(error) => unknown(check, MAX_MAP_COUNT, &error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Status;
    use super::super::host::made_up;
    use super::*;

    fn rlimit(current: u64, maximum: Option<u64>) -> Rlimit {
        Rlimit {
            current: Some(current),
            maximum,
        }
    }

    #[test]
    fn threads_that_may_not_be_raised_are_warned_of() {
        assert_eq!(priority(true).status(), Status::Ok);
        let warning = priority(false);
        assert_eq!(warning.status(), Status::Warn);
        assert!(warning.parts().2.contains("CAP_SYS_NICE"), "{warning:?}");
    }

    #[test]
    fn the_hard_limit_on_files_says_how_many_forks_there_can_be() {
        assert_eq!(
            open_files(rlimit(1024, Some(20_000))).parts(),
            (
                Status::Ok,
                "soft 1024, hard 20000: enough for about 6645 forks at once",
                ""
            )
        );
        let few = open_files(rlimit(1024, Some(1024)));
        assert_eq!(few.status(), Status::Warn);
        assert!(few.parts().1.contains("about 320 forks") && few.parts().2.contains("LimitNOFILE"));
        assert_eq!(open_files(rlimit(10, Some(10))).status(), Status::Warn);
        assert_eq!(
            open_files(rlimit(1024, None)).parts(),
            (Status::Ok, "soft 1024, hard unlimited", "")
        );
    }

    #[test]
    fn fewer_mappings_than_usual_are_warned_of() {
        let look = |text: &str| {
            let (host, _folder) = made_up(&[(MAX_MAP_COUNT, text)]);
            max_map_count(&host)
        };
        assert_eq!(look("65530\n").status(), Status::Ok);
        assert_eq!(look("1048576\n").status(), Status::Ok);
        assert_eq!(look("65529\n").parts().2, "sysctl -w vm.max_map_count=65530");
        assert!(look("lots\n").parts().1.starts_with("cannot tell"));
    }
}
