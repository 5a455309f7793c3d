//! The userfaultfd object (`userfaultfd(2)`, `ioctl_userfaultfd(2)`).

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno as E, ReadWriteFlags};
use rustix::ioctl::{Ioctl, Opcode, Setter, Updater};

use crate::abi;
use crate::address::{ByteLen, HostAddr, HostRange};
use crate::event::{Event, MESSAGE_SIZE, Parsed, parse};
use crate::feature::Features;
use crate::mapped_file::MappedRange;
use crate::outcome::{Errno, Outcome};

/// Most events that one `read` takes.
pub const EVENTS_PER_READ: usize = 64;

/// The feature bit that the kernel sets in a userfaultfd after `UFFDIO_API` (`UFFD_FEATURE_INITIALIZED`).
const INITIALIZED: u64 = 1 << 31;

/// An initialised userfaultfd (after `UFFDIO_API`), of this process or another.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
}

/// Options for creating a userfaultfd.
#[derive(Clone, Copy, Debug)]
pub struct UffdOptions {
    /// Features to ask for.
    pub features: Features,
    /// Whether a `read` without events returns at once. A blocking userfaultfd cannot be polled.
    pub nonblocking: bool,
}

/// Why a userfaultfd could not be created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// Neither the device nor the system call gave one.
    #[error(
        "no userfaultfd: /dev/userfaultfd: {device}; userfaultfd(2): {syscall} (give this user read and write access to \
         /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1)"
    )]
    Unavailable {
        /// The error of opening the device.
        device: Errno,
        /// The error of the system call.
        syscall: Errno,
    },
    /// The kernel lacks a requested feature.
    #[error("this kernel's userfaultfd lacks a feature of {features:?}: {source}")]
    Features {
        /// The requested features.
        features: Features,
        /// The error of the kernel.
        source: Errno,
    },
}

/// Why a received file descriptor is not a usable userfaultfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotAUffd {
    /// It is another kind of file.
    #[error("the file descriptor is not a userfaultfd but {what:?}")]
    OtherFile {
        /// Its kind, as the kernel names it.
        what: String,
    },
    /// Its owner has not done `UFFDIO_API`. Doing it here would set its features.
    #[error("the userfaultfd has not been through UFFDIO_API")]
    NotInitialised,
    /// `/proc/self` could not be read.
    #[error("cannot determine the kind of the file descriptor")]
    Unknown(#[source] std::io::Error),
}

/// A file descriptor that was rejected, and the reason.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Rejected {
    /// The reason.
    pub why: NotAUffd,
    /// The file descriptor. Closing it may block, since the peer chose the file.
    pub fd: OwnedFd,
}

/// Whether a read of events emptied the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// The queue was empty after the read.
    Yes,
    /// The queue may have more events.
    NotYet,
}

impl Uffd {
    /// Creates a userfaultfd for this process: from `/dev/userfaultfd`, else by the system call. Close-on-exec.
    ///
    /// # Errors
    ///
    /// [`CreateError`] if this user may do neither, or the kernel lacks a feature.
    pub fn create(options: UffdOptions) -> Result<Self, CreateError> {
        let mut flags = OFlags::CLOEXEC;
        flags.set(OFlags::NONBLOCK, options.nonblocking);
        let fd = match create_by_device(flags) {
            Ok(fd) => fd,
            Err(device) => create_by_syscall(flags).map_err(|syscall| CreateError::Unavailable {
                device: device.into(),
                syscall: syscall.into(),
            })?,
        };
        let mut api = abi::uffdio_api {
            api: abi::UFFD_API,
            features: options.features.bits(),
            ioctls: 0,
        };
        update::<{ abi::API }, _>(fd.as_fd(), &mut api).map_err(|errno| CreateError::Features {
            features: options.features,
            source: errno.into(),
        })?;
        Ok(Self {
            fd,
            features: options.features,
        })
    }

    /// Takes over a userfaultfd that another process created and sent.
    ///
    /// It is not initialised again, since a second `UFFDIO_API` is an error, and its owner registers its memory. Sets
    /// `O_NONBLOCK`, without which it cannot be polled. The owner shares this flag and can clear it, so
    /// [`read_events`](Self::read_events) does not rely on it.
    ///
    /// # Errors
    ///
    /// [`Rejected`] if it is not an initialised userfaultfd.
    pub fn from_received(fd: OwnedFd) -> Result<Self, Rejected> {
        match features_of_received(fd.as_fd()) {
            Ok(features) => Ok(Self { fd, features }),
            Err(why) => Err(Rejected { why, fd }),
        }
    }

    /// Returns the features that its creator chose.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Reads up to [`EVENTS_PER_READ`] events, appends them to `events`, and returns whether the queue is empty. Never
    /// blocks, even if the peer has cleared `O_NONBLOCK` (Linux 6.10 and newer).
    ///
    /// The kernel returns page faults before other events, so a fault may come before an older `Remove`.
    ///
    /// # Errors
    ///
    /// The error of the `read`.
    pub fn read_events(&self, events: &mut EventBuffer) -> Result<Drained, Errno> {
        let length = match self.read_without_waiting(&mut events.bytes[..]) {
            Ok(length) => length,
            Err(E::AGAIN | E::INTR) => return Ok(Drained::Yes),
            Err(errno) => return Err(errno.into()),
        };
        Ok(if events.parse(length) < EVENTS_PER_READ {
            Drained::Yes
        } else {
            Drained::NotYet
        })
    }

    /// Reads up to [`EVENTS_PER_READ`] events and appends them to `events`. Blocks until there is one, if the
    /// userfaultfd is blocking.
    ///
    /// # Errors
    ///
    /// The error of the `read`; `EAGAIN` if there is no event and it does not block.
    pub fn read_events_blocking(&self, events: &mut EventBuffer) -> Result<(), Errno> {
        let length = rustix::io::read(&self.fd, &mut events.bytes[..]).map_err(Errno::from)?;
        events.parse(length);
        Ok(())
    }

    fn read_without_waiting(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        // `u64::MAX` stands for the file position, as for every file without one.
        match rustix::io::preadv2(
            &self.fd,
            &mut [IoSliceMut::new(buffer)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        ) {
            // Before Linux 6.10 a userfaultfd has no RWF_NOWAIT; O_NONBLOCK was set when it was taken over.
            Err(E::OPNOTSUPP) => rustix::io::read(&self.fd, buffer),
            result => result,
        }
    }

    /// Registers `range` for missing faults: each touch of an absent page becomes an event.
    ///
    /// # Errors
    ///
    /// The kernel's: `EINVAL` (not mapped, not aligned, not anonymous), `EBUSY` (registered elsewhere), …
    ///
    /// # Safety
    ///
    /// If the userfaultfd belongs to this process, `range` must be memory that the caller has mapped, that holds no
    /// Rust object and has no references: its content comes from the installs.
    pub unsafe fn register(&self, range: HostRange) -> Result<(), Errno> {
        self.register_for(range, abi::REGISTER_MODE_MISSING)
    }

    /// Registers `range` for missing faults and write protection: a write to a page that was installed write-protected
    /// is reported, too.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    ///
    /// # Safety
    ///
    /// As [`register`](Self::register).
    pub unsafe fn register_write_protected(&self, range: HostRange) -> Result<(), Errno> {
        self.register_for(range, abi::REGISTER_MODE_MISSING | abi::REGISTER_MODE_WP)
    }

    fn register_for(&self, range: HostRange, mode: u64) -> Result<(), Errno> {
        let mut register = abi::uffdio_register {
            range: range_abi(range),
            mode,
            ioctls: 0,
        };
        update::<{ abi::REGISTER }, _>(self.fd.as_fd(), &mut register).map_err(Errno::from)
    }

    /// Returns `true` if `page`, one page of the mapped size, is registered for write protection. Changes nothing.
    /// Returns `false` if nothing is registered, or while the address space is changing.
    ///
    /// The features of a userfaultfd do not show this: the kernel registers for write protection without them. But it
    /// refuses to install a page write-protected (`EINVAL`) in a range that is not registered for that, before it looks
    /// at the source. The source here cannot be read.
    ///
    /// # Errors
    ///
    /// No address space is left for one page.
    pub fn is_write_protected(&self, page: HostRange) -> Result<bool, Errno> {
        let unreadable = Unreadable::new(page.len())?;
        let mut copy = abi::uffdio_copy {
            dst: page.start().get(),
            src: unreadable.address(),
            len: page.len().get(),
            mode: abi::COPY_MODE_WP,
            copy: 0,
        };
        Ok(match update::<{ abi::COPY }, _>(self.fd.as_fd(), &mut copy) {
            // Not registered for it, not registered at all, changing, or gone.
            Err(E::INVAL | E::NOENT | E::AGAIN | E::SRCH) => false,
            // The source is absent, there is no page for the copy, or the page is already present.
            _ => true,
        })
    }

    /// Ends the registration of `range` and wakes its waiting threads. Absent pages read as zeros from now on.
    ///
    /// # Errors
    ///
    /// The kernel's: `EINVAL` (nothing mapped there), `ENOMEM` (the address space is gone or a mapping could not be split).
    pub fn unregister(&self, range: HostRange) -> Result<(), Errno> {
        set::<{ abi::UNREGISTER }, _>(self.fd.as_fd(), range_abi(range)).map_err(Errno::from)
    }

    /// Copies `bytes` to `to` (`UFFDIO_COPY`) and wakes its waiting threads. The length must be whole pages.
    pub fn copy(&self, to: HostAddr, bytes: &[u8]) -> Outcome {
        let mut copy = abi::uffdio_copy {
            dst: to.get(),
            src: bytes.as_ptr() as u64,
            len: ByteLen::of_slice(bytes).get(),
            mode: 0,
            copy: 0,
        };
        let result = update::<{ abi::COPY }, _>(self.fd.as_fd(), &mut copy);
        Outcome::of_install(result, copy.copy)
    }

    /// Copies a part of a file to `to`, like [`copy`](Self::copy), without reading it in this process. Waits for pages
    /// that are not in the page cache. [Fails](Outcome::Failed) with `EFAULT` if the file ends early.
    pub fn copy_mapped(&self, to: HostAddr, bytes: MappedRange<'_>) -> Outcome {
        let mut copy = abi::uffdio_copy {
            dst: to.get(),
            src: bytes.start().expose_provenance() as u64,
            len: bytes.len().get(),
            mode: 0,
            copy: 0,
        };
        let result = update::<{ abi::COPY }, _>(self.fd.as_fd(), &mut copy);
        Outcome::of_install(result, copy.copy)
    }

    /// Maps the kernel's zero page all over `range` (`UFFDIO_ZEROPAGE`) and wakes its waiting threads.
    /// [Fails](Outcome::Failed) with `EINVAL` on hugetlbfs: copy zeros there.
    pub fn zeropage(&self, range: HostRange) -> Outcome {
        let mut zeropage = abi::uffdio_zeropage {
            range: range_abi(range),
            mode: 0,
            zeropage: 0,
        };
        let result = update::<{ abi::ZEROPAGE }, _>(self.fd.as_fd(), &mut zeropage);
        Outcome::of_install(result, zeropage.zeropage)
    }

    /// Maps pages that are already in the page cache (`UFFDIO_CONTINUE`, for minor faults) and wakes its waiting
    /// threads.
    pub fn continue_range(&self, range: HostRange) -> Outcome {
        let mut arguments = abi::uffdio_continue {
            range: range_abi(range),
            mode: 0,
            mapped: 0,
        };
        let result = update::<{ abi::CONTINUE }, _>(self.fd.as_fd(), &mut arguments);
        Outcome::of_install(result, arguments.mapped)
    }

    /// Wakes every thread that waits for a page of `range`. Each touches its page again, and faults again if it is
    /// absent.
    ///
    /// # Errors
    ///
    /// The kernel's: `EINVAL` for a range that is not whole pages.
    pub fn wake(&self, range: HostRange) -> Result<(), Errno> {
        set::<{ abi::WAKE }, _>(self.fd.as_fd(), range_abi(range)).map_err(Errno::from)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Memory of this process that cannot be read.
struct Unreadable {
    start: *mut std::ffi::c_void,
    len: usize,
}

impl Unreadable {
    fn new(len: ByteLen) -> Result<Self, Errno> {
        let len = usize::try_from(len.get()).map_err(|_| Errno::from(E::NOMEM))?;
        let flags = rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address that the kernel chooses, to which nothing refers.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, rustix::mm::ProtFlags::empty(), flags) }
                .map_err(Errno::from)?;
        Ok(Self { start, len })
    }

    fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        // SAFETY: `new` has made exactly this mapping, and only its address as a number was ever handed out.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}

/// A buffer of events: those read and not yet taken, and room for more.
#[derive(Debug)]
pub struct EventBuffer {
    /// The bytes of the last `read`. Kept between reads, so that it is zeroed only once.
    bytes: Box<[u8; EVENTS_PER_READ * MESSAGE_SIZE]>,
    events: Vec<Event>,
}

impl EventBuffer {
    /// Creates an empty buffer.
    pub fn new() -> Self {
        Self {
            bytes: Box::new([0; _]),
            events: Vec::with_capacity(EVENTS_PER_READ),
        }
    }

    /// Takes the events, in the order in which they were read.
    pub fn drain(&mut self) -> impl Iterator<Item = Event> {
        self.events.drain(..)
    }

    /// Parses the first `length` bytes, which a `read` has just filled, and returns the number of events.
    fn parse(&mut self, length: usize) -> usize {
        let (messages, _) = self.bytes[..length].as_chunks::<MESSAGE_SIZE>();
        for message in messages {
            self.events.push(match parse(message) {
                Parsed::Event(event) => event,
                Parsed::Fork { fd } => {
                    // SAFETY: the kernel has just installed this number into our table for this very message
                    // (`resolve_userfault_fork`), each message is parsed once, and nothing else knows the number.
                    Event::Fork(unsafe { OwnedFd::from_raw_fd(fd) })
                }
            });
        }
        messages.len()
    }
}

impl Default for EventBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// Checks that a received file descriptor is an initialised userfaultfd, makes it non-blocking, and returns its
/// features.
fn features_of_received(fd: BorrowedFd<'_>) -> Result<Features, NotAUffd> {
    let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let link = std::fs::read_link(format!("/proc/self/fd/{number}")).map_err(NotAUffd::Unknown)?;
    // A path starts with a slash, so no file has such a name.
    if link.as_os_str() != "anon_inode:[userfaultfd]" {
        return Err(NotAUffd::OtherFile {
            what: link.to_string_lossy().into_owned(),
        });
    }
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).map_err(NotAUffd::Unknown)?;
    let bits = features_of_fdinfo(&info).ok_or_else(|| {
        NotAUffd::Unknown(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "no API line in its fdinfo",
        ))
    })?;
    if bits & INITIALIZED == 0 {
        return Err(NotAUffd::NotInitialised);
    }
    rustix::fs::fcntl_setfl(fd, OFlags::NONBLOCK).map_err(|errno| NotAUffd::Unknown(errno.into()))?;
    Ok(Features::from_bits_retain(bits & !INITIALIZED))
}

fn range_abi(range: HostRange) -> abi::uffdio_range {
    abi::uffdio_range {
        start: range.start().get(),
        len: range.len().get(),
    }
}

/// Runs an ioctl that reads and writes `argument`.
fn update<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, argument: &mut T) -> rustix::io::Result<()> {
    // SAFETY: `abi` computes each opcode from the type of its argument and checks it against the kernel's number; the
    // callers above pair `abi::X` with `abi::uffdio_x`.
    let ioctl = unsafe { Updater::<OPCODE, T>::new(argument) };
    run(fd, ioctl)
}

/// Runs an ioctl that only reads `argument`.
fn set<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, argument: T) -> rustix::io::Result<()> {
    // SAFETY: as in `update`.
    let ioctl = unsafe { Setter::<OPCODE, T>::new(argument) };
    run(fd, ioctl)
}

fn run<I: Ioctl>(fd: BorrowedFd<'_>, ioctl: I) -> rustix::io::Result<I::Output> {
    // SAFETY: the ioctl object carries an opcode with its matching argument (see `update`). What the kernel changes
    // besides that argument is memory registered with this userfaultfd, whose owner promised in `register` that no
    // Rust object lives there; the source of a copy is a slice or a mapping that is borrowed for the call.
    unsafe { rustix::ioctl::ioctl(fd, ioctl) }
}

fn create_by_device(flags: OFlags) -> rustix::io::Result<OwnedFd> {
    /// `USERFAULTFD_IOC_NEW` takes the flags as its argument and returns the new file descriptor.
    struct New(OFlags);

    // SAFETY: the opcode is the kernel's (asserted in `abi`), its argument is a number that is not dereferenced, and
    // the returned file descriptor has no other owner.
    unsafe impl Ioctl for New {
        type Output = OwnedFd;
        const IS_MUTATING: bool = false;

        fn opcode(&self) -> Opcode {
            abi::IOC_NEW
        }

        fn as_ptr(&mut self) -> *mut std::ffi::c_void {
            std::ptr::without_provenance_mut(self.0.bits() as usize)
        }

        unsafe fn output_from_ptr(
            output: rustix::ioctl::IoctlOutput,
            _: *mut std::ffi::c_void,
        ) -> rustix::io::Result<OwnedFd> {
            // SAFETY: the ioctl succeeded, so this is the file descriptor it made for us.
            Ok(unsafe { OwnedFd::from_raw_fd(output) })
        }
    }

    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    run(device.as_fd(), New(flags))
}

fn create_by_syscall(flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = rustix::mm::UserfaultfdFlags::from_bits_retain(flags.bits());
    // SAFETY: creating the object does nothing to memory; only `register` does, and carries that contract.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// The features in the line `API:\taa:<features>:<all features>` (hexadecimal) of a userfaultfd's fdinfo.
pub(crate) fn features_of_fdinfo(info: &str) -> Option<u64> {
    let api = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = api.trim().split(':').nth(1)?;
    u64::from_str_radix(features, 16).ok()
}

#[cfg(test)]
mod tests {
    use pagecast_testkit::skip::{Need, skip};

    use super::*;

    fn create(features: Features) -> Option<Uffd> {
        match Uffd::create(UffdOptions {
            features,
            nonblocking: true,
        }) {
            Ok(uffd) => Some(uffd),
            Err(error) => {
                skip((Need::Userfaultfd, error));
                None
            }
        }
    }

    #[test]
    fn a_uffd_is_taken_over_with_its_features() {
        let Some(uffd) = create(Features::EVENT_REMOVE) else {
            return;
        };
        let copy = uffd.fd.try_clone().unwrap();
        let taken = Uffd::from_received(copy).unwrap();
        assert_eq!(taken.features(), Features::EVENT_REMOVE);
    }

    #[test]
    fn another_file_is_no_uffd() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Uffd::from_received(file.into()).unwrap_err().why;
        assert!(
            matches!(&error, NotAUffd::OtherFile { what } if what == "/dev/null"),
            "{error}"
        );
    }

    #[test]
    fn a_uffd_without_api_is_refused() {
        let fd = create_by_device(OFlags::CLOEXEC).or_else(|_| create_by_syscall(OFlags::CLOEXEC));
        let Ok(fd) = fd else {
            skip(Need::Userfaultfd);
            return;
        };
        let error = Uffd::from_received(fd).unwrap_err().why;
        assert!(matches!(error, NotAUffd::NotInitialised), "{error}");
    }

    #[test]
    fn reading_does_not_block_when_the_peer_clears_nonblock() {
        let Some(uffd) = create(Features::empty()) else { return };
        rustix::fs::fcntl_setfl(&uffd.fd, OFlags::empty()).unwrap();
        let mut probe = [0; MESSAGE_SIZE];
        if rustix::io::preadv2(
            &uffd.fd,
            &mut [IoSliceMut::new(&mut probe)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        ) == Err(E::OPNOTSUPP)
        {
            skip((Need::Kernel(6, 10), "RWF_NOWAIT of a userfaultfd"));
            return;
        }
        let mut events = EventBuffer::new();
        assert_eq!(uffd.read_events(&mut events), Ok(Drained::Yes));
        assert_eq!(events.drain().count(), 0);
    }

    #[test]
    fn the_api_line_of_fdinfo_is_read() {
        let info = "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:80000008:1ffff\n";
        assert_eq!(features_of_fdinfo(info), Some(0x8000_0008));
        assert_eq!(features_of_fdinfo("pos:\t0\n"), None);
    }
}
