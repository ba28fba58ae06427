//! Durations as people write them: `30m`, `7days`, `250ms`.

use std::time::Duration;

use serde::{Deserialize as _, Deserializer, Serializer, de};

const DAY_SECS: u64 = 24 * 60 * 60;

/// As it is read again. Whole days stay days: months and years would be those of an average.
pub(crate) fn text(value: Duration) -> String {
    let days = value.as_secs() / DAY_SECS;
    let is_whole = value == Duration::from_secs(days * DAY_SECS);
    match days {
        1 if is_whole => "1day".to_owned(),
        2.. if is_whole => format!("{days}days"),
        _ => humantime::format_duration(value).to_string(),
    }
}

pub(super) fn serialize<S: Serializer>(value: &Duration, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_str(&text(*value))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    humantime::parse_duration(&text)
        .map_err(|error| de::Error::custom(format!("not a duration such as 30m: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_they_are_read() {
        let day = Duration::from_hours(24);
        for (value, written) in [
            (Duration::ZERO, "0s"),
            (Duration::from_millis(250), "250ms"),
            (Duration::from_mins(30), "30m"),
            (day, "1day"),
            (day * 7, "7days"),
            (day * 365, "365days"),
            (day + Duration::from_secs(1), "1day 1s"),
        ] {
            assert_eq!(text(value), written);
            assert_eq!(humantime::parse_duration(written), Ok(value));
        }
    }
}
