//! Values of arguments that several commands take.

use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use pagecast_client::{Backend, Prefault};
use pagecast_daemon::config::LONGEST_BUSY_POLL;

/// A backend, by its name.
pub(crate) fn backend() -> impl TypedValueParser<Value = Backend> {
    PossibleValuesParser::new([
        PossibleValue::new("auto").help("The best of the others for the template and the guest"),
        PossibleValue::new("uffd").help("The daemon answers page faults"),
        PossibleValue::new("file").help("Firecracker maps the memory file, and forks share what they have not written"),
    ])
    .map(|name| match name.as_str() {
        "uffd" => Backend::Uffd,
        "file" => Backend::File,
        _ => Backend::Auto,
    })
}

/// What is given ahead, by its name.
pub(crate) fn prefault() -> impl TypedValueParser<Value = Prefault> {
    PossibleValuesParser::new([
        PossibleValue::new("none").help("Nothing: each page is installed when it is touched"),
        PossibleValue::new("working-set").help("The pages that forks touch first, if they were recorded"),
        PossibleValue::new("all").help("The working set, then everything else; only with uffd"),
    ])
    .map(|name| match name.as_str() {
        "working-set" => Prefault::WorkingSet,
        "all" => Prefault::All,
        _ => Prefault::None,
    })
}

/// For how long to look for faults without sleeping.
pub(crate) fn busy_poll(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time > LONGEST_BUSY_POLL {
        return Err(format!(
            "it is {} at most",
            humantime::format_duration(LONGEST_BUSY_POLL)
        ));
    }
    Ok(time)
}

/// A page size, in bytes.
pub(crate) fn page_size() -> impl TypedValueParser<Value = u64> {
    PossibleValuesParser::new(["4K", "2M"]).map(|size| if size == "2M" { 2 << 20 } else { 4 << 10 })
}
