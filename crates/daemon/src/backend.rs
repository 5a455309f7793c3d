//! The choice of a fork's backend, with its reason.

use pagecast::PageSize;
use pagecast_client::Backend;

/// The inputs of the choice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    /// The page size of the guest.
    pub(crate) page_size: PageSize,
    /// The page size is a guess: neither the request that added the template nor the state file of the snapshot has it.
    pub(crate) page_size_is_guess: bool,
    /// Whether the template is a file that a VMM could map.
    pub(crate) has_file: bool,
    /// The file system of the template, if it is remote.
    pub(crate) remote: Option<&'a str>,
    /// The requested feature that needs `uffd`, if there is one.
    pub(crate) needs_faults: Option<&'a str>,
    /// The field of the request that concerns a socket, which only `uffd` has.
    pub(crate) of_socket: Option<&'a str>,
    /// Whether the request has a path for the memory file, which only `file` has.
    pub(crate) of_file: bool,
}

/// Advice for a page size that is a guess.
pub(crate) const GUESS: &str = "where Firecracker refuses the memory file because the snapshot has 2 MiB pages, add the \
                                template again with page_size 2097152 (`--page-size 2M`)";

/// Chooses a backend that is not `auto`, and returns it with the reason.
///
/// # Errors
///
/// Why the backend is not possible.
pub(crate) fn choose(wanted: Backend, facts: Facts<'_>) -> Result<(Backend, String), String> {
    let huge = facts.page_size != PageSize::Small;
    if let Some(what) = facts.needs_faults {
        return match wanted {
            Backend::File => Err(format!(
                "with `file` the kernel answers the faults, so {what} is not possible; use `uffd` or `auto`"
            )),
            Backend::Uffd => Ok((wanted, "it was asked for".to_owned())),
            Backend::Auto => Ok((Backend::Uffd, format!("only `uffd` has {what}"))),
        };
    }
    match wanted {
        Backend::File if !facts.has_file => {
            Err("`file` is for templates that are files, and this one is none; use `uffd` or `auto`".to_owned())
        }
        Backend::File if huge => Err(
            "`file` cannot back a guest with 2 MiB pages: Firecracker maps the file, which has none; use `uffd` or `auto`"
                .to_owned(),
        ),
        Backend::Uffd | Backend::File => Ok((wanted, "it was asked for".to_owned())),
        Backend::Auto => Ok(best(facts)),
    }
}

/// Chooses the backend for `auto`.
fn best(facts: Facts<'_>) -> (Backend, String) {
    if !facts.has_file {
        return (Backend::Uffd, "the template is no file that a VMM could map".to_owned());
    }
    if facts.page_size != PageSize::Small {
        return (
            Backend::Uffd,
            "the guest has 2 MiB pages, which only `uffd` can give it".to_owned(),
        );
    }
    if let Some(field) = facts.of_socket {
        return (
            Backend::Uffd,
            format!("{field} is about a socket, which only `uffd` has"),
        );
    }
    if facts.of_file {
        return (
            Backend::File,
            "path is the place of a memory file, which only `file` has".to_owned(),
        );
    }
    match facts.remote {
        Some(filesystem) => (
            Backend::Uffd,
            format!("the template is on {filesystem}, where a mapping may stall or fail"),
        ),
        None if facts.page_size_is_guess => (
            Backend::File,
            format!(
                "the template is a complete local file: forks share every page they have not written. Whether the guest has \
                 4 KiB pages is not known; {GUESS}"
            ),
        ),
        None => (
            Backend::File,
            "the template is a complete local file and the guest has 4 KiB pages: forks share every page they have \
             not written"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCAL: Facts<'_> = Facts {
        page_size: PageSize::Small,
        page_size_is_guess: false,
        has_file: true,
        remote: None,
        needs_faults: None,
        of_socket: None,
        of_file: false,
    };

    #[test]
    fn auto_shares_where_it_can() {
        let backend = |facts| choose(Backend::Auto, facts).unwrap().0;
        assert_eq!(backend(LOCAL), Backend::File);
        assert_eq!(
            backend(Facts {
                page_size: PageSize::Huge,
                ..LOCAL
            }),
            Backend::Uffd
        );
        assert_eq!(
            backend(Facts {
                remote: Some("NFS"),
                ..LOCAL
            }),
            Backend::Uffd
        );
    }

    #[test]
    fn a_page_size_that_nobody_has_said_is_told_with_the_way_out() {
        let guess = Facts {
            page_size_is_guess: true,
            ..LOCAL
        };
        let (backend, reason) = choose(Backend::Auto, guess).unwrap();
        assert_eq!(backend, Backend::File);
        assert!(reason.contains("--page-size 2M"), "{reason}");
        assert!(!choose(Backend::Auto, LOCAL).unwrap().1.contains("--page-size"));
    }

    #[test]
    fn what_needs_faults_gets_them_or_is_refused() {
        let recorded = Facts {
            needs_faults: Some("a recording"),
            ..LOCAL
        };
        assert_eq!(choose(Backend::Auto, recorded).unwrap().0, Backend::Uffd);
        assert_eq!(choose(Backend::Uffd, recorded).unwrap().0, Backend::Uffd);
        assert!(choose(Backend::File, recorded).unwrap_err().contains("a recording"));
    }

    #[test]
    fn auto_is_what_has_the_fields_that_were_given() {
        let chosen = |facts| choose(Backend::Auto, facts).unwrap();
        let socket = Facts {
            of_socket: Some("uid"),
            ..LOCAL
        };
        let (backend, reason) = chosen(socket);
        assert_eq!(backend, Backend::Uffd);
        assert!(reason.contains("uid"), "{reason}");
        let file = Facts {
            of_file: true,
            remote: Some("NFS"),
            ..LOCAL
        };
        let (backend, reason) = chosen(file);
        assert_eq!(backend, Backend::File);
        assert!(reason.contains("path"), "{reason}");
        // `auto` then picks `uffd`, which refuses the path of the request.
        let huge = Facts {
            page_size: PageSize::Huge,
            ..file
        };
        assert_eq!(chosen(huge).0, Backend::Uffd);
    }

    #[test]
    fn what_is_asked_for_is_given_or_refused_never_exchanged() {
        let remote = Facts {
            remote: Some("FUSE"),
            ..LOCAL
        };
        assert_eq!(choose(Backend::File, remote).unwrap().0, Backend::File);
        assert_eq!(choose(Backend::Uffd, LOCAL).unwrap().0, Backend::Uffd);
        let huge = Facts {
            page_size: PageSize::Huge,
            ..LOCAL
        };
        assert!(choose(Backend::File, huge).unwrap_err().contains("2 MiB"));
    }
}
