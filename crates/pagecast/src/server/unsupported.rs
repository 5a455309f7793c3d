//! The server on platforms without userfaultfd.

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::Path;
use std::time::Duration;

use super::deadlines::Deadlines;
use super::error::{CloseError, Error};
use super::fork::{ForkEvent, ForkId, ForkOptions, ForkState, ForkStatus, LatencyHistogram};
use crate::template::Template;

/// The configuration of a server.
pub struct Builder(());

impl Builder {
    /// Does nothing here.
    #[must_use]
    pub fn workers(self, _workers: usize) -> Self {
        self
    }

    /// Does nothing here.
    #[must_use]
    pub fn deadlines(self, _deadlines: Deadlines) -> Self {
        self
    }

    /// Does nothing here.
    #[must_use]
    pub fn completion_rate(self, _bytes_per_second: Option<NonZeroU64>) -> Self {
        self
    }

    /// Does nothing here.
    #[must_use]
    pub fn fill_threads(self, _threads: NonZeroUsize) -> Self {
        self
    }

    /// Does nothing here.
    #[must_use]
    pub fn fault_around(self, _pages: usize) -> Self {
        self
    }

    /// Does nothing here.
    #[must_use]
    pub fn busy_poll(self, _time: Duration) -> Self {
        self
    }

    /// Does nothing here.
    #[must_use]
    pub fn observer(self, _observer: impl Fn(ForkEvent) + Send + Sync + 'static) -> Self {
        self
    }

    /// Always fails here.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], always.
    pub fn start(self) -> Result<Server, Error> {
        Err(Error::Unsupported)
    }
}

/// A page server, which does not exist on this platform.
pub enum Server {}

impl Server {
    /// Creates a builder whose server will not start.
    pub fn builder() -> Builder {
        Builder(())
    }

    /// There is no server to ask.
    ///
    /// # Errors
    ///
    /// None: it cannot be called.
    pub fn register(&self, _id: ForkId, _template: &Template, _options: &ForkOptions) -> Result<Fork, Error> {
        match *self {}
    }

    /// There is no server to ask.
    ///
    /// # Errors
    ///
    /// None: it cannot be called.
    pub fn listen(&self, _prefix: &ForkId, _template: &Template, _options: &ForkOptions) -> Result<(), Error> {
        match *self {}
    }

    /// There is no server to ask.
    pub fn withdraw(&self, _template: &Template, _how: &str) -> usize {
        match *self {}
    }

    /// There is no server to ask.
    pub fn vacate(&self, _template: &Template, _how: &str, _patience: Duration) -> bool {
        match *self {}
    }

    /// There is no server to ask.
    pub fn wait_withdrawn(&self, _template: &Template, _patience: Duration) -> bool {
        match *self {}
    }

    /// There is no server to ask.
    pub fn fork(&self, _id: &ForkId) -> Option<Fork> {
        match *self {}
    }

    /// There is no server to ask.
    pub fn forks(&self) -> Vec<Fork> {
        match *self {}
    }

    /// There is no server to ask.
    pub fn failures(&self) -> BTreeMap<&'static str, u64> {
        match *self {}
    }

    /// There is no server to ask.
    ///
    /// # Errors
    ///
    /// None: it cannot be called.
    pub fn close(&self, _patience: Duration) -> Result<(), CloseError> {
        match *self {}
    }

    /// There is no server to ask.
    ///
    /// # Errors
    ///
    /// None: it cannot be called.
    pub fn kill(&self, _patience: Duration) -> Result<(), CloseError> {
        match *self {}
    }
}

/// A registered fork, which does not exist on this platform.
#[derive(Clone, Debug)]
pub enum Fork {}

impl Fork {
    /// There is no fork to ask.
    pub fn id(&self) -> &ForkId {
        match *self {}
    }

    /// There is no fork to ask.
    pub fn socket_path(&self) -> &Path {
        match *self {}
    }

    /// There is no fork to ask.
    pub fn status(&self) -> ForkStatus {
        match *self {}
    }

    /// There is no fork to ask.
    pub fn wait(&self, _patience: Duration, _wanted: impl Fn(ForkState) -> bool) -> ForkStatus {
        match *self {}
    }

    /// There is no fork to ask.
    pub fn refusals(&self) -> BTreeMap<&'static str, u64> {
        match *self {}
    }

    /// There is no fork to ask.
    pub fn fault_latency(&self) -> LatencyHistogram {
        match *self {}
    }

    /// There is no fork to ask.
    pub fn install_latency(&self) -> LatencyHistogram {
        match *self {}
    }

    /// There is no fork to complete.
    ///
    /// # Errors
    ///
    /// None: it cannot be called.
    pub fn complete(&self) -> Result<(), Error> {
        match *self {}
    }

    /// There is no fork to kill.
    pub fn kill(&self) {
        match *self {}
    }

    /// There is no fork to forget.
    ///
    /// # Errors
    ///
    /// None: it cannot be called.
    pub fn forget(&self) -> Result<(), Error> {
        match *self {}
    }
}
