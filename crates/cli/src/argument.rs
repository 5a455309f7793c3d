//! Values of arguments that several commands take.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use pagecast_client::Backend;

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

/// A page size, in bytes.
pub(crate) fn page_size() -> impl TypedValueParser<Value = u64> {
    PossibleValuesParser::new(["4K", "2M"]).map(|size| if size == "2M" { 2 << 20 } else { 4 << 10 })
}
