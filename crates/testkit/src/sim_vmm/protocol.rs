//! Requests to a simulated VMM and its answers: lines of JSON over its stdin and stdout.

use std::num::NonZeroU32;
use std::ops::Range;
use std::path::PathBuf;

use pagecast_uffd::Features;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::memory::PageSize;
use crate::peer::{RawHandshake, RawReport};
use crate::template_file::TemplateModel;

/// A line on its stdin. Each runs on a thread of its own, so that the next does not wait for it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) command: Command,
}

/// A line on its stdout, when the request with this ID is done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) id: u64,
    pub(crate) result: Result<serde_json::Value, String>,
}

/// All requests.
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
    /// Its name, for messages.
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

/// A request with an answer of its own type.
pub trait Work: Into<Command> {
    /// The type of the answer.
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
/// order. Once a process, unless it failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connect {
    /// The socket of the page server.
    pub socket: PathBuf,
    /// The expected content of the memory.
    pub template: TemplateModel,
    /// The guest's memory.
    pub regions: Vec<Region>,
    /// The size of the guest's pages.
    pub page_size: PageSize,
    /// The format of the handshake.
    pub form: HandshakeForm,
    /// Whether the socket stays open for life, as from Firecracker 1.12 on. Before, it was closed at once.
    pub keep_socket: bool,
    /// Whether the process keeps its own copy of the userfaultfd, as Firecracker does.
    pub keep_uffd: bool,
    /// The features to request for the userfaultfd ([`Features`]); Firecracker requests `EVENT_REMOVE`.
    pub feature_bits: u64,
    /// The faults that its memory is registered for.
    pub registered: Registered,
    /// Whether the message is sent byte by byte, with the userfaultfd in the first, instead of at once.
    pub byte_by_byte: bool,
}

impl Connect {
    /// The request that corresponds to Firecracker, for a guest of 4 KiB pages whose memory is one region, all of
    /// `template`.
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

/// The faults that a guest's memory is registered for with its userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Registered {
    /// Missing pages, as Firecracker does.
    Missing,
    /// Missing pages and write protection, as in a VMM that tracks which pages are written.
    WriteProtected,
}

/// One region of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its size in bytes, whole pages.
    pub size: u64,
    /// The offset of its content in the template, in bytes.
    pub offset: u64,
}

/// The format of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandshakeForm {
    /// A bare array of regions with `page_size` and `page_size_kib`, both in bytes: Firecracker's.
    Array,
    /// The same without `page_size`, as in some versions.
    ArrayPageSizeKib,
    /// An object with the array in `mappings`.
    Object,
}

/// The handshake was sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connected {
    /// The address of each region in the process's memory, in the order of the request.
    pub base_host_virt_addrs: Vec<u64>,
}

/// Become a guest whose memory is one region of 4 KiB pages, all of a mem-file, mapped privately, as Firecracker does
/// with a `File` backend. It needs no page server, and nothing can be removed. Once a process, unless it failed;
/// instead of [`Connect`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapFile {
    /// The mem-file.
    pub path: PathBuf,
    /// Its expected content.
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

/// Become a guest with plain anonymous memory, which the kernel fills with zeros: the lower bound for pages without
/// content. Once a process, unless it failed; instead of [`Connect`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct MapAnonymous {
    /// Its size in bytes, whole pages of 4 KiB.
    pub size: u64,
}

/// Become a guest and visit its working set at once, like a resumed VM. There is no request between the two, so that
/// the times have nothing else.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resume {
    /// The source of the guest's memory.
    pub memory: Memory,
    /// Its working set.
    pub visit: Visit,
}

/// The source of a guest's memory.
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
    /// Maximum time in milliseconds.
    pub within_ms: u64,
}

/// Whether the server closed the connection.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Closed {
    /// Time of waiting in microseconds. `None` if it was still open at the end.
    pub after_us: Option<u64>,
}

/// A selection of a guest's pages, which are counted through all its regions, in the order of [`Connect::regions`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The first page.
    pub start: u64,
    /// The page after the last; `None` for all pages.
    pub end: Option<u64>,
    /// Every `n`th page from `start` on; 1 for all.
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

    /// Selects every `n`th of these pages, from the first on.
    #[must_use]
    pub const fn every(self, n: NonZeroU32) -> Self {
        Self { every: n, ..self }
    }
}

/// The order in which pages are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Ascending.
    Sequential,
    /// Shuffled, the same for the same seed.
    Random(u64),
}

/// The distribution of a command's pages over its threads.
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
    /// Number of threads.
    pub threads: usize,
    /// The order; with [`Order::Random`] each pass and each thread of [`Share::Everything`] has its own.
    pub order: Order,
    /// The pages of each thread.
    pub share: Share,
    /// Number of passes.
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

/// The result of a read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReadReport {
    /// The result of the checks.
    pub checked: Checked,
    /// Time from the first touch to the end of the last check, in microseconds.
    pub elapsed_us: u64,
}

/// The result of checking pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Pages checked; a page counts once for each visit.
    pub pages: u64,
    /// Pages of them with a wrong word.
    pub mismatches: u64,
    /// Mismatches with template bytes in a page that had been removed.
    pub stale: u64,
    /// The first mismatch of the first thread that met one.
    pub first_mismatch: Option<Mismatch>,
}

/// A wrong word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Its page, as [`Pages`] counts.
    pub page: u64,
    /// Its address in the process's memory.
    pub address: u64,
    /// Its offset in the template, in bytes.
    pub offset: u64,
    /// The expected word.
    pub expected: u64,
    /// The actual word.
    pub found: u64,
    /// The history of the page.
    pub history: History,
}

/// The history of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// It was removed at least once: it may never show template bytes again.
    pub removed: bool,
    /// It was written after that, last with this generation.
    pub written: Option<NonZeroU32>,
}

/// Write every other word of pages, so that the words between show whether the page was right when it was written to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Write {
    /// Which pages.
    pub pages: Pages,
    /// The pattern; at most 2^31 - 1.
    pub generation: NonZeroU32,
    /// Number of threads, each with its share.
    pub threads: usize,
}

/// The result of touching pages.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Touched {
    /// Number of pages.
    pub pages: u64,
    /// Time from the first to the end of the last, in microseconds.
    pub elapsed_us: u64,
}

/// Give pages back with `MADV_DONTNEED`, like a balloon: one call for each range and region.
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

/// Remove random ranges from one thread, in bursts, half of them around pages that readers visit at that moment.
/// Meanwhile the readers read random pages, check them, and write to one in eight. At the end every page of the guest
/// is checked once more.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RemoveRace {
    /// Duration in milliseconds, unless [`EndRaces`] comes first.
    pub millis: u64,
    /// Number of readers.
    pub threads: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Register the memory with the userfaultfd again and again, until [`EndRaces`] comes. No real VMM does this.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RegisterAgain;

/// End all [races](RemoveRace) now.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct EndRaces;

/// The result of a race.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RaceReport {
    /// The result of all checks.
    pub checked: Checked,
    /// Ranges removed.
    pub removals: u64,
    /// Pages written.
    pub writes: u64,
    /// Total time in microseconds.
    pub elapsed_us: u64,
}

/// Touch pages for the first time, one after the other from one thread, and measure each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// The pages. The caller ensures that they are absent.
    pub pages: Pages,
    /// In which order.
    pub order: Order,
}

/// Times of touches.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct LatencyReport {
    /// Number of measured touches.
    pub count: u64,
    /// The median in nanoseconds.
    pub p50_ns: u64,
    /// The 90th percentile in nanoseconds.
    pub p90_ns: u64,
    /// The 99th percentile in nanoseconds.
    pub p99_ns: u64,
    /// The maximum in nanoseconds.
    pub max_ns: u64,
    /// Time from the first to the end of the last, in nanoseconds.
    pub total_ns: u64,
}

/// Read the first word of pages as fast as possible, without checks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Touch {
    /// Which pages.
    pub pages: Pages,
    /// Number of threads, each with its share.
    pub threads: usize,
    /// In which order.
    pub order: Order,
}

/// Touch a word of pages in this order from one thread, as fast as possible, without checks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Visit {
    /// Ranges of pages, as [`Pages`] counts, one after the other.
    pub runs: Vec<Range<u64>>,
    /// Whether to write the word instead of reading it. The write is not noted: such pages cannot be checked any more.
    pub write: bool,
}

/// The result of visiting pages.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Visited {
    /// Number of pages.
    pub pages: u64,
    /// Time from the first to the end of the last, in nanoseconds.
    pub elapsed_ns: u64,
}

/// Register one more page that is not in the handshake, and touch it. Answers only if a page is installed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct TouchOutside;

/// Clear `O_NONBLOCK` of the userfaultfd. The flag is shared with the server.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ClearNonblock;
