//! The source of an epoll event of a worker.

use rustix::event::epoll::EventData;

/// The file descriptor, of the worker or of one of its forks, that an epoll event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Inbox,
    IdleTimer,
    Uffd(usize),
    Process(usize),
    Socket(usize),
}

impl Token {
    pub(super) fn encode(self) -> EventData {
        EventData::new_u64(match self {
            Self::Inbox => 0,
            Self::IdleTimer => 4,
            Self::Uffd(slot) => (slot as u64) << 2 | 1,
            Self::Process(slot) => (slot as u64) << 2 | 2,
            Self::Socket(slot) => (slot as u64) << 2 | 3,
        })
    }

    pub(super) fn decode(data: EventData) -> Self {
        let data = data.u64();
        let slot = usize::try_from(data >> 2).unwrap_or(usize::MAX);
        match data & 3 {
            1 => Self::Uffd(slot),
            2 => Self::Process(slot),
            3 => Self::Socket(slot),
            _ if slot == 1 => Self::IdleTimer,
            _ => Self::Inbox,
        }
    }
}
