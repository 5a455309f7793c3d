//! Tests that cannot run on this machine.

use std::fmt;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;

use pagecast_uffd::lease::LeaseBreaks;
use rustix::thread::CapabilitySet;

/// A requirement of a test. If this machine has it, skipping the test for it in CI is a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// A device for virtual machines, and the processor of the tiny guest.
    Kvm,
    /// The rights of root.
    Root,
    /// Capabilities: see `capabilities(7)`.
    Capabilities(CapabilitySet),
    /// This many free pages of 2 MiB.
    Hugepages(u64),
    /// A file system of temporary files that has leases.
    Leases,
    /// A userfaultfd that handles faults in the kernel, too.
    Userfaultfd,
    /// A kernel of at least this version.
    Kernel(u32, u32),
    /// This many processors.
    Processors(usize),
    /// A program in `PATH`.
    Program(&'static str),
}

impl Need {
    /// Checks, apart from the test, whether this machine has it.
    pub fn is_there(self) -> bool {
        match self {
            Self::Kvm => cfg!(target_arch = "x86_64") && Path::new("/dev/kvm").exists(),
            Self::Root | Self::Userfaultfd => rustix::process::geteuid().is_root(),
            Self::Capabilities(capabilities) => {
                rustix::thread::capabilities(None).is_ok_and(|held| held.effective.contains(capabilities))
            }
            Self::Hugepages(pages) => {
                let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
                free.is_ok_and(|free| free.trim().parse::<u64>().is_ok_and(|free| free >= pages))
            }
            Self::Leases => has_leases().unwrap_or(false),
            Self::Kernel(major, minor) => kernel().is_some_and(|version| version >= (major, minor)),
            Self::Processors(wanted) => std::thread::available_parallelism().is_ok_and(|there| there.get() >= wanted),
            Self::Program(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
            }
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("/dev/kvm on x86-64"),
            Self::Root => f.write_str("root"),
            Self::Capabilities(capabilities) => {
                let names: Vec<_> = capabilities
                    .iter_names()
                    .map(|(name, _)| format!("CAP_{name}"))
                    .collect();
                f.write_str(&names.join(" and "))
            }
            Self::Hugepages(pages) => write!(f, "{pages} free pages of 2 MiB"),
            Self::Leases => f.write_str("a file system of temporary files with leases"),
            Self::Userfaultfd => f.write_str("userfaultfd"),
            Self::Kernel(major, minor) => write!(f, "Linux {major}.{minor}"),
            Self::Processors(processors) => write!(f, "{processors} processors"),
            Self::Program(name) => write!(f, "the program {name}"),
        }
    }
}

/// The reason for a skip, and the missing requirement if it can be checked apart from the test.
#[derive(Clone, Debug)]
pub struct Skip {
    need: Option<Need>,
    reason: String,
}

impl From<Need> for Skip {
    fn from(need: Need) -> Self {
        Self {
            need: Some(need),
            reason: format!("needs {need}"),
        }
    }
}

impl<R: fmt::Display> From<(Need, R)> for Skip {
    fn from((need, reason): (Need, R)) -> Self {
        Self {
            need: Some(need),
            reason: format!("needs {need}: {reason}"),
        }
    }
}

impl From<&str> for Skip {
    fn from(reason: &str) -> Self {
        Self {
            need: None,
            reason: reason.to_owned(),
        }
    }
}

impl From<&String> for Skip {
    fn from(reason: &String) -> Self {
        reason.as_str().into()
    }
}

/// Reports why the rest of a test is skipped: on its output, and in the file named by the variable `PAGECAST_SKIPPED`,
/// since test runners hide the output of tests that pass. Takes a [`Need`], a need with a reason, or a reason that only
/// the test itself can check.
///
/// # Panics
///
/// If `CI` is set and this machine has what the test needs.
#[track_caller]
pub fn skip(skip: impl Into<Skip>) {
    let Skip { need, reason } = skip.into();
    assert!(
        !in_ci() || !is_wrong(need),
        "skipped in CI, where it must run: {reason}"
    );
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os("PAGECAST_SKIPPED") else {
        return;
    };
    let test = std::thread::current().name().unwrap_or("main").to_owned();
    // One write of one line, so that tests that run at once do not mix theirs.
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    let file = std::fs::File::options().create(true).append(true).open(&path);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        eprintln!("failed to note a skipped test in {}: {error}", path.display());
    }
}

/// Returns `true` if a skip for this need is wrong, because the machine has it.
fn is_wrong(need: Option<Need>) -> bool {
    need.is_some_and(Need::is_there)
}

/// Set by CI services and `.ci/run`.
fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false" && ci != "0")
}

fn has_leases() -> anyhow::Result<bool> {
    let file = tempfile::NamedTempFile::new()?;
    // A lease for reading needs a file that is not open for writing.
    let file = file.into_temp_path();
    let read = std::fs::File::open(&file)?;
    Ok(LeaseBreaks::on_this_thread()?.take_read_lease(read.as_fd()).is_ok())
}

fn kernel() -> Option<(u32, u32)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_machine_has_and_has_not_is_told_apart() {
        assert!(Need::Kernel(4, 11).is_there());
        assert!(!Need::Kernel(1000, 0).is_there());
        assert!(Need::Processors(1).is_there());
        assert!(!Need::Processors(usize::MAX).is_there());
        assert!(Need::Program("sh").is_there());
        assert!(!Need::Program("no-such-program").is_there());
        assert_eq!(Need::Root.is_there(), rustix::process::geteuid().is_root());
        assert!(!Need::Hugepages(u64::MAX).is_there());
        assert_eq!(
            Need::Kvm.is_there(),
            Path::new("/dev/kvm").exists() && cfg!(target_arch = "x86_64")
        );
    }

    #[test]
    fn only_a_skip_whose_need_is_there_is_wrong() {
        assert!(is_wrong(Some(Need::Program("sh"))));
        assert!(!is_wrong(Some(Need::Program("no-such-program"))));
        assert!(!is_wrong(None));
    }

    /// Runs the test below in a process of its own, with this value of `CI`. Returns whether it passes, and its output.
    fn in_process(test: &str, ci: &str) -> (bool, String) {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("skip::tests::{test}"), "--ignored", "--nocapture"])
            .env("CI", ci)
            .env_remove("PAGECAST_SKIPPED")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    #[test]
    #[ignore = "run by the test below, which sets CI"]
    fn skips_for_lack_of_a_shell() {
        skip(Need::Program("sh"));
    }

    #[test]
    #[ignore = "run by the test below, which sets CI"]
    fn skips_for_lack_of_what_is_not_there() {
        skip(Need::Program("no-such-program"));
    }

    #[test]
    fn in_ci_a_skip_fails_whose_need_is_there() {
        let (passes, said) = in_process("skips_for_lack_of_a_shell", "true");
        assert!(
            !passes && said.contains("skipped in CI, where it must run: needs the program sh"),
            "{said}"
        );
        let (passes, said) = in_process("skips_for_lack_of_a_shell", "");
        assert!(passes && said.contains("skipped: needs the program sh"), "{said}");
        let (passes, said) = in_process("skips_for_lack_of_what_is_not_there", "true");
        assert!(
            passes && said.contains("skipped: needs the program no-such-program"),
            "{said}"
        );
    }
}
