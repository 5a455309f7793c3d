//! Values of arguments that several commands take.

use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use pagecast_client::{Backend, Prefault};
use pagecast_daemon::config::LONGEST_BUSY_POLL;

/// A backend, by its name.
pub(crate) fn backend() -> impl TypedValueParser<Value = Backend> {
    PossibleValuesParser::new([
        PossibleValue::new("auto").help("The better of the two for the template and the guest"),
        PossibleValue::new("uffd").help("The daemon answers the page faults"),
        PossibleValue::new("file").help("Firecracker maps the memory file, and forks share what they have not written"),
    ])
    .map(|name| match name.as_str() {
        "uffd" => Backend::Uffd,
        "file" => Backend::File,
        _ => Backend::Auto,
    })
}

/// A value of `--prefault`, by its name.
pub(crate) fn prefault() -> impl TypedValueParser<Value = Prefault> {
    PossibleValuesParser::new([
        PossibleValue::new("none").help("No page: each is installed when it is first touched"),
        PossibleValue::new("working-set").help("The pages that forks touch first, if they are known"),
        PossibleValue::new("all").help("The working set, then all other pages; only with uffd"),
    ])
    .map(|name| match name.as_str() {
        "working-set" => Prefault::WorkingSet,
        "all" => Prefault::All,
        _ => Prefault::None,
    })
}

/// Time to poll for page faults, at most [`LONGEST_BUSY_POLL`].
pub(crate) fn busy_poll(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time > LONGEST_BUSY_POLL {
        return Err(format!(
            "the maximum is {}",
            humantime::format_duration(LONGEST_BUSY_POLL)
        ));
    }
    Ok(time)
}

/// A page size, in bytes.
pub(crate) fn page_size() -> impl TypedValueParser<Value = u64> {
    PossibleValuesParser::new(["4K", "2M"]).map(|size| if size == "2M" { 2 << 20 } else { 4 << 10 })
}
