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

/// Whether the server went away rather than refused the statement.
fn is_outage(error: &DieselError) -> bool {
    use DatabaseErrorKind as Kind;
    match error {
        DieselError::DatabaseError(
            Kind::ClosedConnection | Kind::UnableToSendCommand | Kind::ReadOnlyTransaction,
            _,
        )
        | DieselError::BrokenTransactionManager => true,
        // The driver does not hand the SQLSTATE on: 57P01 to 57P03 and 57014, by their messages.
        DieselError::DatabaseError(Kind::Unknown, info) => [
            "terminating connection",
            "the database system is",
            "canceling statement due to statement timeout",
        ]
        .iter()
        .any(|message| info.message().starts_with(message)),
        _ => false,
    }
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
