//! What a row of a file says, by column.

use chrono::{DateTime, NaiveDateTime, Utc};

use crate::{
    auth::ImportRow,
    model::{Role, Violation},
};

/// Columns, by all names that they are known by; the first is ours.
pub(super) const COLUMNS: [&[&str]; 11] = [
    &["user_id", "id"],
    &["email"],
    &["username"],
    &["full_name", "name"],
    &["password_hash", "hashed_password"],
    &["tier"],
    &["role"],
    &["is_active"],
    &["email_verified_at", "email_verified", "is_verified"],
    &["created_at"],
    &["last_login_at"],
];

pub(super) type Values = [String; COLUMNS.len()];

/// A row that begins in this line.
pub(super) fn row(line: u64, values: Values) -> ImportRow {
    let [
        user_id,
        email,
        username,
        full_name,
        password_hash,
        tier,
        role,
        is_active,
        email_verified_at,
        created_at,
        last_login_at,
    ] = values;
    let created_at = time(&created_at);
    ImportRow {
        row: line.cast_signed(),
        user_id,
        email,
        username,
        full_name,
        password_hash,
        tier,
        role: match &*role {
            "" => Ok(Role::User),
            role => role.parse(),
        },
        is_active: boolean(&is_active).map(|is_active| is_active.unwrap_or(true)),
        email_verified_at: match boolean(&email_verified_at) {
            Ok(Some(true)) => {
                let since = created_at.clone().ok().flatten();
                Ok(Some(since.unwrap_or_else(Utc::now)))
            }
            Ok(_) => Ok(None),
            Err(_) => time(&email_verified_at),
        },
        created_at,
        last_login_at: time(&last_login_at),
    }
}

/// As Postgres and Python write it.
fn boolean(text: &str) -> Result<Option<bool>, Violation> {
    match &*text.to_ascii_lowercase() {
        "" => Ok(None),
        "true" | "t" | "1" => Ok(Some(true)),
        "false" | "f" | "0" => Ok(Some(false)),
        _ => Err("must be true or false".into()),
    }
}

/// As Postgres and Python write it; without a zone it is UTC.
fn time(text: &str) -> Result<Option<DateTime<Utc>>, Violation> {
    if text.is_empty() {
        return Ok(None);
    }
    let zoned = || {
        let formats = ["%Y-%m-%d %H:%M:%S%.f%#z"];
        let mut read = formats
            .iter()
            .map(|format| DateTime::parse_from_str(text, format));
        read.find_map(Result::ok).map(|time| time.to_utc())
    };
    let local = || {
        let formats = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f"];
        let mut read = formats
            .iter()
            .map(|format| NaiveDateTime::parse_from_str(text, format));
        read.find_map(Result::ok).map(|time| time.and_utc())
    };
    let time = DateTime::parse_from_rfc3339(text).ok();
    time.map(|time| time.to_utc())
        .or_else(zoned)
        .or_else(local)
        .filter(|time| (0..253_402_300_800).contains(&time.timestamp()))
        .map(Some)
        .ok_or_else(|| "must be a time from 1970 on such as 2026-11-20T12:00:00Z".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_postgres_and_python_write_them() {
        let expected = "2024-03-01T11:30:00.250Z"
            .parse::<DateTime<Utc>>()
            .expect("right");
        for text in [
            "2024-03-01T11:30:00.250Z",
            "2024-03-01T12:30:00.25+01:00",
            "2024-03-01 12:30:00.25+01",
            "2024-03-01 12:30:00.250+01:00",
            "2024-03-01 11:30:00.250000",
            "2024-03-01T11:30:00.250",
        ] {
            assert_eq!(time(text), Ok(Some(expected)), "{text}");
        }
        assert_eq!(time(""), Ok(None));
        for text in [
            "yesterday",
            "1709292600",
            "1969-12-31T23:59:59Z",
            "2024-02-30 00:00:00",
        ] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}
