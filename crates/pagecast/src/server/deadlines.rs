//! How long a server waits.

use std::time::Duration;

/// How long a server waits.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For a VMM to connect to a registered fork.
    pub connect: Duration,
    /// From the connection to the end of the handshake message.
    pub handshake: Duration,
    /// For the template to be read, or for memory to become free. After that, the fault fails and its VMM is killed.
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
