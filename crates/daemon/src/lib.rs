//! The long-lived service: control API, registry of templates and forks, metrics, configuration.
#![forbid(unsafe_code)]
