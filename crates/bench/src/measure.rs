//! Measured quantities, and their units.

use serde::Serialize;

/// A measured quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The median time of a fault.
    FaultP50Us,
    /// The 99th percentile of the time of a fault.
    FaultP99Us,
    /// The slowest fault.
    FaultMaxUs,
    /// Faults answered in a second, of all forks together.
    FaultsPerSecond,
    /// CPU time of the server for each fault.
    CpuPerFaultUs,
    /// Time from the start of a restore until the VMM runs.
    ResumedMs,
    /// Time from the start of a restore until the working set has been read.
    ReadyMs,
    /// The same, 99th percentile.
    ReadyP99Ms,
    /// Faults of one fork that the server has answered; absent if the kernel answers them.
    DemandFaults,
    /// Data copied into the fork.
    InstalledMib,
    /// Data per second.
    GibPerSecond,
    /// Number of processors that the server kept busy.
    ProcessorsUsed,
    /// Time for each page of 4 KiB.
    NanosPerPage,
    /// Memory that only this fork has.
    PrivateMib,
    /// The sum of that of all forks.
    PrivateSumMib,
    /// The sum of the proportional set sizes of all forks.
    PssMib,
    /// The same, relative to the least that the forks could cost.
    PssToLeast,
    /// CPU time of the server.
    ServerCpuSeconds,
    /// Resident memory of the server, mapped template pages included.
    ServerMib,
    /// Resident memory of the server that belongs to no file.
    ServerOwnMib,
    /// Number of times that a thread of the server slept and woke.
    Wakeups,
    /// Open file descriptors of the server.
    Fds,
    /// Threads of the server.
    Threads,
    /// Time to register a fork and connect its VMM.
    StartMs,
    /// Time to add a template.
    AddTemplateMs,
}

impl Measure {
    /// The first, in their order.
    pub(crate) const FIRST: Self = Self::FaultP50Us;
    /// The last.
    pub(crate) const LAST: Self = Self::AddTemplateMs;

    /// Returns the heading of its column: name and unit.
    pub fn heading(self) -> &'static str {
        match self {
            Self::FaultP50Us => "p50, us",
            Self::FaultP99Us => "p99, us",
            Self::FaultMaxUs => "max, us",
            Self::FaultsPerSecond => "faults/s",
            Self::CpuPerFaultUs => "CPU us/fault",
            Self::ResumedMs => "resumed, ms",
            Self::ReadyMs => "ready, ms",
            Self::ReadyP99Ms => "ready p99, ms",
            Self::DemandFaults => "faults/fork",
            Self::InstalledMib => "installed, MiB",
            Self::GibPerSecond => "GiB/s",
            Self::ProcessorsUsed => "CPUs used",
            Self::NanosPerPage => "ns/page",
            Self::PrivateMib => "private/fork, MiB",
            Self::PrivateSumMib => "private in sum, MiB",
            Self::PssMib => "PSS in sum, MiB",
            Self::PssToLeast => "PSS to least",
            Self::ServerCpuSeconds => "server CPU, s",
            Self::ServerMib => "server resident, MiB",
            Self::ServerOwnMib => "server private, MiB",
            Self::Wakeups => "wakeups",
            Self::Fds => "fds",
            Self::Threads => "threads",
            Self::StartMs => "start of a fork, ms",
            Self::AddTemplateMs => "add template, ms",
        }
    }

    /// Returns `true` if it is compared with other subjects: times and rates, not mere information.
    pub(crate) fn is_compared(self) -> bool {
        matches!(
            self,
            Self::FaultP50Us
                | Self::FaultP99Us
                | Self::FaultMaxUs
                | Self::FaultsPerSecond
                | Self::CpuPerFaultUs
                | Self::ReadyMs
                | Self::GibPerSecond
                | Self::NanosPerPage
        )
    }

    /// Formats `value` with a fitting number of decimals.
    pub fn show(self, value: f64) -> String {
        let decimals = match self {
            Self::FaultsPerSecond | Self::DemandFaults | Self::Wakeups | Self::Fds | Self::Threads => 0,
            Self::GibPerSecond | Self::ProcessorsUsed | Self::PssToLeast | Self::ServerCpuSeconds => 2,
            _ if value.abs() < 9.995 => 2,
            _ if value.abs() < 999.5 => 1,
            _ => 0,
        };
        let plain = format!("{value:.decimals$}");
        if decimals == 0 { grouped(&plain) } else { plain }
    }
}

/// Puts a comma between thousands.
fn grouped(integer: &str) -> String {
    let (sign, digits) = match integer.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", integer),
    };
    let mut grouped = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_as_many_digits_as_they_are_worth() {
        assert_eq!(Measure::FaultsPerSecond.show(1_234_567.8), "1,234,568");
        assert_eq!(Measure::FaultsPerSecond.show(999.0), "999");
        assert_eq!(Measure::FaultP50Us.show(8.123), "8.12");
        assert_eq!(Measure::ReadyMs.show(123.456), "123.5");
        assert_eq!(Measure::ReadyMs.show(6794.3), "6,794");
    }
}
