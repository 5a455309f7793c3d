//! Many forks of one template at once: in the real Firecracker, or simulated.

mod firecracker;
mod simulated;
mod vmm;

use std::fmt;
use std::num::NonZeroU8;
use std::path::Path;
use std::thread;

use anyhow::{Result, anyhow};
use pagecast_testkit::firecracker::{Kvm, binary, build_guest, has_guest_source, kvm};

pub use self::vmm::{Blank, Mismatches, Size, Template, Vmm, WRITE_EVERY};
use crate::progress::Progress;

/// The kind of VMMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The real Firecracker, with the tiny guest.
    Firecracker,
    /// Simulated VMMs, and the reason.
    Simulated(String),
}

impl Kind {
    /// Returns the kind that this machine can run. The guest is built from its source, and Firecracker may be fetched,
    /// so both need the source tree of this build.
    ///
    /// # Errors
    ///
    /// KVM is there but cannot be used: such a machine must not simulate.
    pub fn here() -> Result<Self> {
        if let Kvm::Missing(why) = kvm()? {
            return Ok(Self::Simulated(why));
        }
        if !has_guest_source() {
            let why = "the source of the tiny guest is not where pagecast was built";
            return Ok(Self::Simulated(why.to_owned()));
        }
        let progress = Progress::start("getting Firecracker and the guest");
        Ok(match build_guest().and_then(|_| binary()) {
            Ok(binary) => {
                progress.done(&binary.display().to_string());
                Self::Firecracker
            }
            Err(error) => Self::Simulated(format!("{error:#}")),
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Firecracker => f.write_str("real Firecrackers with the tiny guest"),
            Self::Simulated(why) => write!(f, "simulated VMMs instead of Firecracker ({why})"),
        }
    }
}

/// Creates a template of this size in `folder`. Simulated VMMs are processes of this program (see
/// [`sim_vmm`](crate::sim_vmm)).
///
/// # Errors
///
/// It cannot be created.
pub fn create_template(kind: &Kind, folder: &Path, size: Size) -> Result<Box<dyn Template>> {
    let Size { mem_mib, data_mib } = size;
    let of_size = format!("{mem_mib} MiB, of which {data_mib} MiB data");
    Ok(match kind {
        Kind::Firecracker => {
            let progress = Progress::start("booting and snapshotting the guest");
            let template = firecracker::Snapshotted::create(folder, size)?;
            progress.done(&of_size);
            Box::new(template)
        }
        Kind::Simulated(_) => {
            let progress = Progress::start("writing a template for simulated VMMs");
            let template = simulated::Simulated::create(folder, size)?;
            progress.done(&of_size);
            Box::new(template)
        }
    })
}

/// The tag of a fork, by which its writes differ from others'. There are 254 tags.
pub fn tag(number: u32) -> NonZeroU8 {
    let tag = u8::try_from(number % 254).expect("it is less than 254");
    NonZeroU8::MIN.saturating_add(tag)
}

/// Works on all items at the same time, a thread each.
///
/// # Errors
///
/// The first error, once all have ended.
pub fn at_once<I: Send, T: Send>(items: Vec<I>, work: impl Fn(I) -> Result<T> + Sync) -> Result<Vec<T>> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
        // All threads are joined before any result is looked at.
        let outcomes: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        let outcome = |joined: thread::Result<Result<T>>| joined.unwrap_or_else(|_| Err(anyhow!("a thread panicked")));
        outcomes.into_iter().map(outcome).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_different_tags() {
        for number in 1..1000 {
            assert_ne!(tag(number), tag(number + 1), "{number}");
            assert!(tag(number).get() < u8::MAX, "one more than it is a pattern");
        }
    }

    #[test]
    fn all_work_is_done_in_order_and_at_the_same_time() {
        let barrier = std::sync::Barrier::new(20);
        let doubled = at_once((0..20).collect(), |number: u32| {
            barrier.wait();
            Ok(2 * number)
        });
        assert_eq!(doubled.unwrap(), (0..20).map(|number| 2 * number).collect::<Vec<_>>());
    }

    #[test]
    fn one_error_and_one_panic_are_errors() {
        assert!(
            at_once(vec![1, 2], |number| if number == 2 {
                Err(anyhow!("two"))
            } else {
                Ok(())
            })
            .is_err()
        );
        assert!(at_once(vec![1, 0], |number: u32| Ok(1_u32.div_euclid(number))).is_err());
    }
}
