//! From the driver's errors to ours. Their text goes into the cause, which only the log sees.

use std::str::FromStr;

use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::pooled_connection::deadpool::PoolError;

use crate::{
    error::{Error, Result},
    model::Violation,
};

impl From<DieselError> for Error {
    fn from(error: DieselError) -> Self {
        if is_outage(&error) {
            Self::Unavailable(error.into())
        } else {
            Self::Internal(error.into())
        }
    }
}

impl From<PoolError> for Error {
    /// Whatever keeps the pool from giving a connection, the caller may try again.
    fn from(error: PoolError) -> Self {
        Self::Unavailable(error.into())
    }
}

/// Whether the server could not do it now, rather than refused it: repeated, it may succeed.
fn is_outage(error: &DieselError) -> bool {
    use DatabaseErrorKind as Kind;
    match error {
        DieselError::DatabaseError(
            Kind::ClosedConnection
            | Kind::UnableToSendCommand
            | Kind::ReadOnlyTransaction
            | Kind::SerializationFailure,
            _,
        )
        | DieselError::BrokenTransactionManager => true,
        DieselError::DatabaseError(Kind::Unknown, info) => is_passing(info.message()),
        _ => false,
    }
}

/// The driver does not hand the SQLSTATE on: by the messages of Postgres.
fn is_passing(message: &str) -> bool {
    [
        // 57P01 to 57P03
        "terminating connection",
        "the database system is",
        // 57014 and 55P03: the time of a statement or of a lock is up, or an operator ended it.
        "canceling statement due to",
        // 40P01
        "deadlock detected",
        // 53100, also of a write that was cut short
        "could not extend file",
    ]
    .iter()
    .any(|start| message.starts_with(start))
        // 53100, of temporary and other files
        || message.ends_with("No space left on device")
}

/// Turns a violation of a unique index into `taken`.
pub(super) fn on_unique(taken: fn() -> Error) -> impl FnOnce(DieselError) -> Error {
    move |error| match error {
        DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _) => taken(),
        error => error.into(),
    }
}

/// Reads a value that was checked before it was stored.
pub(super) fn stored<T: FromStr<Err = Violation>>(column: &str, text: &str) -> Result<T> {
    text.parse()
        .map_err(|violation| Error::internal(format!("stored {column} {violation}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: DatabaseErrorKind, message: &str) -> Error {
        DieselError::DatabaseError(kind, Box::new(message.to_owned())).into()
    }

    #[test]
    fn what_may_succeed_when_repeated_is_unavailable_and_a_refusal_is_not() {
        for message in [
            "deadlock detected",
            "could not extend file \"base/5/16402\": No space left on device",
            "could not extend file \"base/5/16402\": wrote only 4096 of 8192 bytes at block 7",
            "could not write to file \"base/pgsql_tmp/pgsql_tmp7.0\": No space left on device",
            "canceling statement due to lock timeout",
            "terminating connection due to administrator command",
            "the database system is starting up",
        ] {
            let error = of(DatabaseErrorKind::Unknown, message);
            assert!(matches!(error, Error::Unavailable(_)), "{message}");
        }
        let error = of(
            DatabaseErrorKind::SerializationFailure,
            "could not serialize",
        );
        assert!(matches!(error, Error::Unavailable(_)));
        for (kind, message) in [
            (DatabaseErrorKind::Unknown, "bigint out of range"),
            (DatabaseErrorKind::CheckViolation, "deadlock detected"),
        ] {
            assert!(matches!(of(kind, message), Error::Internal(_)), "{message}");
        }
    }
}
