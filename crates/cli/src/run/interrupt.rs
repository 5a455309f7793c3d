//! Signals that ask for the end of a run.

use std::io;

use pagecast_command::signals::{self, EndSignal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Signals that arrive after this was created. They no longer end the process by themselves.
#[derive(Debug)]
pub(crate) struct Interrupt(UnboundedReceiver<EndSignal>);

impl Interrupt {
    /// Starts to catch the signals.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) fn watch() -> io::Result<Self> {
        let (heard, signals) = unbounded_channel();
        signals::watch(move |signal| {
            // The receiver is gone only while the process exits.
            let _ = heard.send(signal);
        })?;
        Ok(Self(signals))
    }

    /// Waits for the next signal. Returns its number. Cancel safe.
    pub(crate) async fn signalled(&mut self) -> u8 {
        match self.0.recv().await {
            Some(signal) => u8::try_from(signal.number()).unwrap_or(u8::MAX),
            // The thread that sends them never ends.
            None => std::future::pending().await,
        }
    }
}
