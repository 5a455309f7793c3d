//! The content of the message, before validation.

use serde::Deserialize;

use super::MAX_REGIONS;

/// A region as the VMM describes it, not yet validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedRegion {
    /// Its address in the VMM, in bytes.
    pub base_host_virt_addr: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Its offset in the template, in bytes.
    pub offset: u64,
    /// Its page size in bytes.
    pub page_size: u64,
}

/// Why a message cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Not UTF-8.
    #[error("the handshake is not UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// Not JSON, or not of the expected shape.
    #[error("the handshake cannot be read as a list of regions: {0}")]
    Json(#[source] serde_json::Error),
    /// More than [`MAX_REGIONS`].
    #[error("the handshake has {count} regions; at most {MAX_REGIONS} are served")]
    TooManyRegions {
        /// Number of regions.
        count: usize,
    },
    /// A region without a page size.
    #[error("region {index} has neither page_size nor page_size_kib")]
    NoPageSize {
        /// Number of the region, from 0.
        index: usize,
    },
    /// `page_size` and `page_size_kib`, both in bytes, differ.
    #[error("region {index} has page_size {page_size} but page_size_kib {page_size_kib} (both are in bytes)")]
    PageSizesDiffer {
        /// Number of the region, from 0.
        index: usize,
        /// The value of `page_size`.
        page_size: u64,
        /// The value of `page_size_kib`.
        page_size_kib: u64,
    },
}

#[derive(Deserialize)]
struct WireRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

#[derive(Deserialize)]
struct WireObject {
    mappings: Vec<WireRegion>,
}

/// Parses a complete message: a bare array of regions, or an object with the array as `mappings`.
///
/// # Errors
///
/// [`ParseError`] with the reason. Memory use is bounded by the length of the message.
pub fn parse(message: &[u8]) -> Result<Vec<RequestedRegion>, ParseError> {
    let text = str::from_utf8(message).map_err(ParseError::NotUtf8)?;
    let wire: Vec<WireRegion> = if text.trim_start().starts_with('{') {
        serde_json::from_str::<WireObject>(text).map(|object| object.mappings)
    } else {
        serde_json::from_str(text)
    }
    .map_err(ParseError::Json)?;
    if wire.len() > MAX_REGIONS {
        return Err(ParseError::TooManyRegions { count: wire.len() });
    }
    wire.into_iter()
        .enumerate()
        .map(|(index, region)| {
            let page_size = match (region.page_size, region.page_size_kib) {
                (Some(page_size), Some(page_size_kib)) if page_size != page_size_kib => {
                    return Err(ParseError::PageSizesDiffer {
                        index,
                        page_size,
                        page_size_kib,
                    });
                }
                (Some(bytes), _) | (None, Some(bytes)) => bytes,
                (None, None) => return Err(ParseError::NoPageSize { index }),
            };
            Ok(RequestedRegion {
                base_host_virt_addr: region.base_host_virt_addr,
                size: region.size,
                offset: region.offset,
                page_size,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REGION: RequestedRegion = RequestedRegion {
        base_host_virt_addr: 0x7f00_0000_0000,
        size: 1 << 27,
        offset: 4096,
        page_size: 4096,
    };

    fn text(page_sizes: &str) -> String {
        format!(r#"{{"base_host_virt_addr":139637976727552,"size":134217728,"offset":4096{page_sizes}}}"#)
    }

    #[test]
    fn both_forms_and_both_names_of_the_page_size_are_read() {
        for page_sizes in [
            r#","page_size":4096"#,
            r#","page_size_kib":4096"#,
            r#","page_size":4096,"page_size_kib":4096,"later":{"deep":[1]}"#,
        ] {
            let region = text(page_sizes);
            assert_eq!(parse(format!("[{region}]").as_bytes()).unwrap(), [REGION]);
            let object = format!(r#" {{"version":2,"mappings":[{region}]}}"#);
            assert_eq!(parse(object.as_bytes()).unwrap(), [REGION]);
        }
    }

    #[test]
    fn page_sizes_that_are_missing_or_differ_are_refused() {
        let missing = format!("[{}]", text(""));
        assert!(matches!(
            parse(missing.as_bytes()),
            Err(ParseError::NoPageSize { index: 0 })
        ));
        let differ = format!("[{}]", text(r#","page_size":4096,"page_size_kib":4"#));
        assert!(matches!(
            parse(differ.as_bytes()),
            Err(ParseError::PageSizesDiffer {
                index: 0,
                page_size: 4096,
                page_size_kib: 4
            })
        ));
    }

    #[test]
    fn what_is_not_a_list_of_regions_is_refused() {
        assert!(matches!(parse(b"[\xff]"), Err(ParseError::NotUtf8(_))));
        for message in ["[", "[1]", "{}", r#"{"mappings":{}}"#, "[{}]", "[[[[", "null", ""] {
            assert!(
                matches!(parse(message.as_bytes()), Err(ParseError::Json(_))),
                "{message}"
            );
        }
        let negative = r#"[{"base_host_virt_addr":-1,"size":4096,"offset":0,"page_size":4096}]"#;
        assert!(matches!(parse(negative.as_bytes()), Err(ParseError::Json(_))));
        let huge = r#"[{"base_host_virt_addr":18446744073709551616,"size":1,"offset":0,"page_size":4096}]"#;
        assert!(matches!(parse(huge.as_bytes()), Err(ParseError::Json(_))));
    }

    #[test]
    fn more_regions_than_any_vmm_has_are_refused() {
        let regions = vec![text(r#","page_size":4096"#); MAX_REGIONS + 1].join(",");
        let message = format!("[{regions}]");
        assert!(matches!(
            parse(message.as_bytes()),
            Err(ParseError::TooManyRegions { .. })
        ));
    }

    #[test]
    fn an_empty_list_is_read_as_such() {
        // The layout refuses a fork without memory.
        assert!(parse(b"[]").unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read(regions in proptest::collection::vec(any::<[u64; 4]>(), 0..20)) {
            let expected: Vec<_> = regions.iter().map(|&[base_host_virt_addr, size, offset, page_size]|
                RequestedRegion { base_host_virt_addr, size, offset, page_size }).collect();
            let json: Vec<_> = expected.iter().map(|region| serde_json::json!({
                "base_host_virt_addr": region.base_host_virt_addr, "size": region.size,
                "offset": region.offset, "page_size": region.page_size })).collect();
            prop_assert_eq!(parse(&serde_json::to_vec(&json).unwrap()).unwrap(), expected);
        }
    }
}
