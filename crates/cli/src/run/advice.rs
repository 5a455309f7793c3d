//! Advice for a snapshot that Firecracker does not load.

/// Advice that follows the error, or nothing.
pub(crate) fn on_failed_load(error: &str, is_jailed: bool) -> &'static str {
    if error.contains("hugetlbfs") {
        "\n  the snapshot has 2 MiB pages, which need `uffd`: remove the template and add it again with --page-size 2M, or run \
         with --backend uffd"
    } else if is_jailed && error.contains("UFFD object") {
        "\n  the jailed user cannot create a userfaultfd: the host needs /dev/userfaultfd when the jailer is started (Linux 6.1, \
         and a jailer that puts it into the jail), or `sysctl -w vm.unprivileged_userfaultfd=1`"
    } else if is_jailed && error.contains("Permission denied") {
        "\n  the jailed user cannot open a file: the memory file keeps the owner and mode of the template, which must be \
         readable for that user"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_for_its_pages_says_what_to_do() {
        let huge = "Cannot restore hugetlbfs backed snapshot by mapping the memory file. Please use uffd.";
        assert!(on_failed_load(huge, false).contains("--page-size 2M"));
        assert_eq!(on_failed_load("no way", true), "");
    }

    #[test]
    fn only_jailed_firecrackers_lack_what_the_jail_lacks() {
        let denied = "Permission denied (os error 13)";
        assert!(on_failed_load(denied, true).contains("jailed user"));
        assert_eq!(on_failed_load(denied, false), "");
    }
}
