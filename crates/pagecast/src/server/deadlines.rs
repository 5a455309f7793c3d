//! How long a server waits for what.

use std::time::Duration;

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For a VMM to connect to a registered fork.
    pub connect: Duration,
    /// From connecting to the end of the handshake message.
    pub handshake: Duration,
    /// For the template to be read, or for memory to become free, before a fault is given up and its VMM killed.
    pub fault: Duration,
}

impl Default for Deadlines {
    /// 60 s to connect, 5 s for the handshake, 60 s for a fault.
    fn default() -> Self {
        Self {
            connect: Duration::from_mins(1),
            handshake: Duration::from_secs(5),
            fault: Duration::from_mins(1),
        }
    }
}
