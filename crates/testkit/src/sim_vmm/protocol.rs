//! What a test asks of a simulated VMM and what it answers: lines of JSON over its stdin and stdout.

use std::num::NonZeroU32;
use std::ops::Range;
use std::path::PathBuf;

use pagecast_uffd::Features;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::memory::PageSize;
use crate::peer::{RawHandshake, RawReport};
use crate::template_file::TemplateModel;

/// A line on the sim's stdin. Each runs on a thread of its own, so that the next does not wait for it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) command: Command,
}

/// A line on the sim's stdout, whenever the request with this id is done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) id: u64,
    pub(crate) result: Result<serde_json::Value, String>,
}

/// Everything a simulated VMM can be asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// See [`Connect`].
    Connect(Connect),
    /// See [`MapFile`].
    MapFile(MapFile),
    /// See [`MapAnonymous`].
    MapAnonymous(MapAnonymous),
    /// See [`Resume`].
    Resume(Resume),
    /// See [`AwaitClose`].
    AwaitClose(AwaitClose),
    /// See [`Read`].
    Read(Read),
    /// See [`Write`].
    Write(Write),
    /// See [`Remove`].
    Remove(Remove),
    /// See [`RemoveRace`].
    RemoveRace(RemoveRace),
    /// See [`RegisterAgain`].
    RegisterAgain(RegisterAgain),
    /// See [`EndRaces`].
    EndRaces(EndRaces),
    /// See [`Latency`].
    Latency(Latency),
    /// See [`Touch`].
    Touch(Touch),
    /// See [`Visit`].
    Visit(Visit),
    /// See [`TouchOutside`].
    TouchOutside(TouchOutside),
    /// See [`ClearNonblock`].
    ClearNonblock(ClearNonblock),
    /// See [`RawHandshake`].
    RawHandshake(RawHandshake),
    /// Exit with this code. Not answered.
    Exit(i32),
    /// Abort, as after a crash. Not answered.
    Abort,
}

impl Command {
    /// What it is called, for messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::MapFile(_) => "map_file",
            Self::MapAnonymous(_) => "map_anonymous",
            Self::Resume(_) => "resume",
            Self::AwaitClose(_) => "await_close",
            Self::Read(_) => "read",
            Self::Write(_) => "write",
            Self::Remove(_) => "remove",
            Self::RemoveRace(_) => "remove_race",
            Self::RegisterAgain(_) => "register_again",
            Self::EndRaces(_) => "end_races",
            Self::Latency(_) => "latency",
            Self::Touch(_) => "touch",
            Self::Visit(_) => "visit",
            Self::TouchOutside(_) => "touch_outside",
            Self::ClearNonblock(_) => "clear_nonblock",
            Self::RawHandshake(_) => "raw_handshake",
            Self::Exit(_) => "exit",
            Self::Abort => "abort",
        }
    }
}

/// A command that is answered, with a report of its own type.
pub trait Work: Into<Command> {
    /// What comes back.
    type Report: DeserializeOwned;
}

macro_rules! work {
    ($($command:ident -> $report:ty),+ $(,)?) => {$(
        impl From<$command> for Command {
            fn from(command: $command) -> Self {
                Self::$command(command)
            }
        }

        impl Work for $command {
            type Report = $report;
        }
    )+};
}

work! {
    Connect -> Connected,
    MapFile -> (),
    MapAnonymous -> (),
    Resume -> Resumed,
    AwaitClose -> Closed,
    Read -> ReadReport,
    Write -> Touched,
    Remove -> (),
    RemoveRace -> RaceReport,
    RegisterAgain -> (),
    EndRaces -> (),
    Latency -> LatencyReport,
    Touch -> Touched,
    Visit -> Visited,
    TouchOutside -> (),
    ClearNonblock -> (),
    RawHandshake -> RawReport,
}

/// Become a guest: map the regions, create a userfaultfd, register, connect and send the handshake, in Firecracker's
/// order. Once per process, unless it failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connect {
    /// The socket of the page server.
    pub socket: PathBuf,
    /// What the memory should hold.
    pub template: TemplateModel,
    /// The guest's memory.
    pub regions: Vec<Region>,
    /// The size of the guest's pages.
    pub page_size: PageSize,
    /// How the handshake is written.
    pub form: HandshakeForm,
    /// Whether the socket stays open for life, as from Firecracker 1.12 on; before, it was closed at once.
    pub keep_socket: bool,
    /// Whether the process keeps its own copy of the userfaultfd, as Firecracker does.
    pub keep_uffd: bool,
    /// The features asked of the userfaultfd ([`Features`]); Firecracker's are `EVENT_REMOVE`.
    pub feature_bits: u64,
    /// What its memory is registered for.
    pub registered: Registered,
    /// Whether the message is sent byte by byte, the userfaultfd with the first one, instead of at once.
    pub byte_by_byte: bool,
}

impl Connect {
    /// What Firecracker does for a guest of 4 KiB pages whose memory is one region, all of `template`.
    pub fn new(socket: impl Into<PathBuf>, template: &TemplateModel) -> Self {
        Self {
            socket: socket.into(),
            template: template.clone(),
            regions: vec![Region {
                size: template.size,
                offset: 0,
            }],
            page_size: PageSize::Base,
            form: HandshakeForm::Array,
            keep_socket: true,
            keep_uffd: true,
            feature_bits: Features::EVENT_REMOVE.bits(),
            registered: Registered::Missing,
            byte_by_byte: false,
        }
    }
}

/// What the memory of a guest is registered for with its userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Registered {
    /// Missing pages, as Firecracker does.
    Missing,
    /// Missing pages and write protection, as a VMM does that tracks which pages are written.
    WriteProtected,
}

/// One region of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its size in bytes, whole pages.
    pub size: u64,
    /// Where in the template its content starts, in bytes.
    pub offset: u64,
}

/// How a handshake is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandshakeForm {
    /// A bare array of regions with `page_size` and `page_size_kib`, both in bytes: Firecracker's.
    Array,
    /// The same without `page_size`, as some versions had it.
    ArrayPageSizeKib,
    /// An object with the array in `mappings`.
    Object,
}

/// The handshake was sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connected {
    /// Where each region is in the process's memory, in the order asked for.
    pub base_host_virt_addrs: Vec<u64>,
}

/// Become a guest whose memory is one region of 4 KiB pages, all of a mem-file, mapped privately: what Firecracker does
/// with a `File` backend. No page server is asked, and nothing can be removed. Once per process, unless it failed; instead
/// of [`Connect`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapFile {
    /// The mem-file.
    pub path: PathBuf,
    /// What it should hold.
    pub template: TemplateModel,
}

impl MapFile {
    /// Maps all of `template`, which is at `path`.
    pub fn new(path: impl Into<PathBuf>, template: &TemplateModel) -> Self {
        Self {
            path: path.into(),
            template: template.clone(),
        }
    }
}

/// Become a guest whose memory is plain anonymous memory, which the kernel fills with zeros by itself: what nobody can be
/// faster than for pages without content. Once per process, unless it failed; instead of [`Connect`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct MapAnonymous {
    /// Its size in bytes, whole pages of 4 KiB.
    pub size: u64,
}

/// Become a guest and visit its working set at once, as a VM that is resumed does. Nobody is asked between the two, so
/// that nothing else is in the times.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resume {
    /// Where the guest's memory comes from.
    pub memory: Memory,
    /// Its working set.
    pub visit: Visit,
}

/// Where a guest's memory comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// See [`Connect`].
    Uffd(Connect),
    /// See [`MapFile`].
    File(MapFile),
}

/// A guest has visited its working set.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Resumed {
    /// From the start until it had memory, in nanoseconds.
    pub mapped_ns: u64,
    /// From the start until it had visited all of its working set, in nanoseconds.
    pub ready_ns: u64,
}

/// Wait until the server closes the connection of [`Connect`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct AwaitClose {
    /// How long at most, in milliseconds.
    pub within_ms: u64,
}

/// Whether the server closed the connection.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Closed {
    /// After how many microseconds of waiting, or `None` where it was still open in the end.
    pub after_us: Option<u64>,
}

/// Which of a guest's pages: they are counted through all its regions, in the order of [`Connect::regions`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The first page.
    pub start: u64,
    /// The page after the last, or `None` for all the guest has.
    pub end: Option<u64>,
    /// Every so many pages from `start` on; 1 is all of them.
    pub every: NonZeroU32,
}

impl Pages {
    /// All pages of the guest.
    pub const ALL: Self = Self {
        start: 0,
        end: None,
        every: NonZeroU32::MIN,
    };

    /// The pages of `range`.
    pub const fn range(range: Range<u64>) -> Self {
        Self {
            start: range.start,
            end: Some(range.end),
            every: NonZeroU32::MIN,
        }
    }

    /// Of these pages only every `n`th, from the first on.
    #[must_use]
    pub const fn every(self, n: NonZeroU32) -> Self {
        Self { every: n, ..self }
    }
}

/// In which order pages are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Ascending.
    Sequential,
    /// Shuffled, the same for the same seed.
    Random(u64),
}

/// How the pages of a command are spread over its threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// Each page goes to one thread.
    Divided,
    /// Each thread visits every page, so that several wait for the same one.
    Everything,
}

/// Read pages and check every word against what the page should hold: the template's bytes, what [`Write`] wrote, or
/// zeros after [`Remove`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Read {
    /// Which pages.
    pub pages: Pages,
    /// How many threads.
    pub threads: usize,
    /// In which order; with [`Order::Random`] each pass and each thread of [`Share::Everything`] has its own.
    pub order: Order,
    /// What each thread visits.
    pub share: Share,
    /// How often.
    pub passes: u32,
}

impl Default for Read {
    /// All pages, one thread, ascending, once.
    fn default() -> Self {
        Self {
            pages: Pages::ALL,
            threads: 1,
            order: Order::Sequential,
            share: Share::Divided,
            passes: 1,
        }
    }
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReadReport {
    /// The outcome of the checks.
    pub checked: Checked,
    /// From the first touch to the end of the last check, in microseconds.
    pub elapsed_us: u64,
}

/// The outcome of checking pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Pages checked; a page counts as often as it was visited.
    pub pages: u64,
    /// Of these, those that held a wrong word.
    pub mismatches: u64,
    /// Of the mismatches, those with template bytes in a page that had been removed.
    pub stale: u64,
    /// The first mismatch of the first thread that met one.
    pub first_mismatch: Option<Mismatch>,
}

/// A wrong word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Its page, as [`Pages`] counts.
    pub page: u64,
    /// Where it is in the process's memory.
    pub address: u64,
    /// Where it is in the template, in bytes.
    pub offset: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// What had happened to the page.
    pub history: History,
}

/// What a guest has done to a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// It was removed at least once: never again may it show template bytes.
    pub removed: bool,
    /// It was written after that, the last time with this generation.
    pub written: Option<NonZeroU32>,
}

/// Write to pages: every other word, so that the words between tell whether the page was right when it was written to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Write {
    /// Which pages.
    pub pages: Pages,
    /// Which pattern; at most 2^31 - 1.
    pub generation: NonZeroU32,
    /// How many threads, each writing its share.
    pub threads: usize,
}

/// Pages were touched.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Touched {
    /// How many.
    pub pages: u64,
    /// From the first to the end of the last, in microseconds.
    pub elapsed_us: u64,
}

/// Give pages back with `MADV_DONTNEED`, as a balloon does: each of the ranges by one call (one per region it spans).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Remove {
    /// Ranges of pages, as [`Pages`] counts.
    pub ranges: Vec<Range<u64>>,
}

impl Remove {
    /// One range of pages.
    pub fn range(range: Range<u64>) -> Self {
        Self { ranges: vec![range] }
    }
}

/// Remove random ranges from one thread, in bursts and half of them around pages that others visit just then, while those
/// others read random pages, check them, and write to one in eight.
/// In the end every page of the guest is checked once more.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RemoveRace {
    /// For how long, in milliseconds, unless [`EndRaces`] comes first.
    pub millis: u64,
    /// How many threads read.
    pub threads: usize,
    /// What chance starts from.
    pub seed: u64,
}

/// Register the memory with the userfaultfd again and again, until [`EndRaces`] comes. No VMM does it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RegisterAgain;

/// End all [races](RemoveRace) now.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct EndRaces;

/// What came of a race.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RaceReport {
    /// The outcome of all checks.
    pub checked: Checked,
    /// Ranges removed.
    pub removals: u64,
    /// Pages written.
    pub writes: u64,
    /// All in all, in microseconds.
    pub elapsed_us: u64,
}

/// Touch pages that nobody has touched yet, one after the other from one thread, and measure each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// Which pages. That they are absent is up to the caller.
    pub pages: Pages,
    /// In which order.
    pub order: Order,
}

/// How long touches took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct LatencyReport {
    /// How many were measured.
    pub count: u64,
    /// Half of them took at most so many nanoseconds.
    pub p50_ns: u64,
    /// 90% of them took at most so many nanoseconds.
    pub p90_ns: u64,
    /// 99% of them took at most so many nanoseconds.
    pub p99_ns: u64,
    /// The slowest, in nanoseconds.
    pub max_ns: u64,
    /// From the first to the end of the last, in nanoseconds.
    pub total_ns: u64,
}

/// Read the first word of pages as fast as it goes, and check nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Touch {
    /// Which pages.
    pub pages: Pages,
    /// How many threads, each with its share.
    pub threads: usize,
    /// In which order.
    pub order: Order,
}

/// Touch a word of pages in this very order from one thread, as fast as it goes, and check nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Visit {
    /// Ranges of pages, as [`Pages`] counts, one after the other.
    pub runs: Vec<Range<u64>>,
    /// Whether the word is written instead of read. No note is made of it: such pages cannot be checked any more.
    pub write: bool,
}

/// Pages were visited.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Visited {
    /// How many.
    pub pages: u64,
    /// From the first to the end of the last, in nanoseconds.
    pub elapsed_ns: u64,
}

/// Register one more page that the handshake did not mention, and touch it. Answered only if somebody installs it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TouchOutside;

/// Clear `O_NONBLOCK` of the userfaultfd. The flag is shared with the server.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ClearNonblock;
