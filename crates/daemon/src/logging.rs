//! Log lines on standard error. `docs/logs.md` lists them.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Subscriber, error, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::{RecordFields, VisitOutput};
use tracing_subscriber::fmt::format::{DefaultVisitor, Writer};
use tracing_subscriber::fmt::{FormatFields, MakeWriter};

use crate::config::LogFormat;
use pagecast_command::stderr;

/// The field of JSON lines with the event's name. The text format has the message only.
const EVENT: &str = "event";

/// Starts to write log lines to standard error, through [`stderr`]. Events of forks and templates make lines, faults do
/// not. `RUST_LOG` sets the level. Only the first call in a process has an effect.
pub fn start(format: LogFormat) {
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    stderr::start(move |dropped| {
        line_of(format, ansi, || {
            warn!(
                event = "log_lines_dropped",
                lines = dropped,
                "log lines dropped because stderr was not read in time"
            );
        })
    });
    // A second call is a test in the same process.
    let _ = tracing::subscriber::set_global_default(lines(format, ansi, stderr::Lines));
    std::panic::set_hook(Box::new(|panic| {
        error!(
            event = "panicked",
            error = stderr::describe_panic(panic),
            "a thread has panicked"
        );
    }));
}

/// The text that `log` writes to standard error.
fn line_of(format: LogFormat, ansi: bool, log: impl FnOnce()) -> Vec<u8> {
    let written = Arc::<Mutex<Vec<u8>>>::default();
    let to = Arc::clone(&written);
    tracing::subscriber::with_default(lines(format, ansi, move || Collect(Arc::clone(&to))), log);
    std::mem::take(&mut *written.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Writes to memory.
struct Collect(Arc<Mutex<Vec<u8>>>);

impl Write for Collect {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn lines(
    format: LogFormat,
    ansi: bool,
    to: impl for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
) -> Box<dyn Subscriber + Send + Sync> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(to)
        .with_target(false);
    match format {
        LogFormat::Text => Box::new(lines.with_ansi(ansi).fmt_fields(WithoutEvent).finish()),
        LogFormat::Json => Box::new(lines.json().flatten_event(true).with_current_span(false).finish()),
    }
}

/// Writes fields as usual, without the name of the event.
struct WithoutEvent;

impl<'writer> FormatFields<'writer> for WithoutEvent {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = SkipEvent(DefaultVisitor::new(writer, true));
        fields.record(&mut visitor);
        visitor.0.finish()
    }
}

struct SkipEvent<'writer>(DefaultVisitor<'writer>);

impl Visit for SkipEvent<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != EVENT {
            self.0.record_str(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.0.record_error(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.record_debug(field, value);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use pagecast::server::{FailReason, ForkEvent};

    use super::*;
    use crate::{Daemon, Settings};

    /// The log line of an event that no test can bring about in a whole daemon: a disk that hangs.
    async fn not_completed(format: LogFormat) -> String {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            run_dir: Some(folder.path().join("run")),
            ..Settings::default()
        };
        let daemon = Daemon::start(settings.resolve().unwrap()).await.unwrap();
        let event = ForkEvent::NotCompleted {
            id: "a".parse().unwrap(),
            reason: Arc::new(FailReason::ReadDeadline {
                deadline: Duration::from_mins(1),
            }),
        };
        let path = folder.path().join("log");
        let log = Arc::new(File::create(&path).unwrap());
        tracing::subscriber::with_default(lines(format, false, log), || {
            daemon.service().on_event(&event);
        });
        std::fs::read_to_string(path).unwrap()
    }

    #[tokio::test]
    async fn a_completion_that_is_given_up_is_a_line_of_json() {
        let line = not_completed(LogFormat::Json).await;
        assert_eq!(line.lines().count(), 1, "{line}");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["event"], "fork_not_completed", "{line}");
        assert_eq!(line["level"], "WARN", "{line}");
        assert_eq!(line["fork"], "a", "{line}");
        assert_eq!(line["code"], "read_deadline", "{line}");
    }

    #[tokio::test]
    async fn people_read_the_message_and_not_the_name_of_the_event() {
        let line = not_completed(LogFormat::Text).await;
        assert_eq!(line.lines().count(), 1, "{line}");
        let (_, rest) = line.split_once(" WARN ").unwrap();
        assert!(
            rest.starts_with("cannot be completed, is served on fork=a code="),
            "{line}"
        );
        assert!(!line.contains("event"), "{line}");
    }
}
