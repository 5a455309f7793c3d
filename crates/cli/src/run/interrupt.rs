//! The signals that ask us to end.

use std::io;

use pagecast_command::signals::{self, EndSignal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The signals that ask for an end, from when this is made, instead of ending at once.
#[derive(Debug)]
pub(crate) struct Interrupt(UnboundedReceiver<EndSignal>);

impl Interrupt {
    /// Watches for them from now on.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) fn watch() -> io::Result<Self> {
        let (heard, signals) = unbounded_channel();
        signals::watch(move |signal| {
            // Nobody listens any more only while we exit.
            let _ = heard.send(signal);
        })?;
        Ok(Self(signals))
    }

    /// Waits for the next; its number. May be dropped and called again.
    pub(crate) async fn signalled(&mut self) -> u8 {
        match self.0.recv().await {
            Some(signal) => u8::try_from(signal.number()).unwrap_or(u8::MAX),
            // The thread that sends them never ends.
            None => std::future::pending().await,
        }
    }
}
