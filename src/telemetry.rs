//! Logs: to standard error, one event a line.

use std::io::{IsTerminal as _, stderr};

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogSettings};

/// Whatever the filter says: at `debug` the driver shows the values bound to every statement, hashes
/// of passwords and keys among them.
const SILENCED: [&str; 2] = ["tokio_postgres=info", "tokio_postgres::query=info"];

/// Installs the process-wide subscriber.
///
/// # Errors
/// What is wrong with `log.filter`.
pub fn init(settings: &LogSettings, dev: bool) -> Result<(), String> {
    let mut filter = EnvFilter::try_new(&settings.filter)
        .map_err(|error| format!("setting log.filter: {error}"))?;
    for silenced in SILENCED {
        filter = filter.add_directive(silenced.parse().map_err(|_| silenced)?);
    }
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell of a line that cannot be written on standard error too, and panic when that fails:
        // a log on a full disk must not cost calls.
        .log_internal_errors(false)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal());
    let human = match settings.format {
        LogFormat::Auto => dev,
        LogFormat::Human => true,
        LogFormat::Json => false,
    };
    let installed = if human {
        builder.with_target(false).try_init()
    } else {
        builder
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .try_init()
    };
    installed.map_err(|error| error.to_string())
}
