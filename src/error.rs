//! What can go wrong, once for the whole service. Knows no protocol: `grpc::status` turns an
//! [`Error`] into a status.

use std::{error::Error as StdError, fmt, time::Duration};

use crate::model::{QuotaExceeded, Scope, Violation};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Invalid(Violations),
    #[error("the call needs a credential, as `authorization: Bearer` and a token or key")]
    CredentialMissing,
    /// A token or key was presented and is not good.
    #[error("the {credential} {fault}")]
    Refused {
        credential: Credential,
        fault: Fault,
    },
    /// Wrong password, unknown account, no password: one answer for all.
    #[error("identifier or password is wrong")]
    InvalidCredentials,
    #[error("this kind of caller may not do this")]
    CallerNotAllowed,
    #[error("the service account lacks the scope {0}")]
    ScopeMissing(Scope),
    /// The named user is turned off.
    #[error("the account is disabled")]
    AccountDisabled,
    #[error("no such user")]
    UserNotFound,
    /// Nobody would be left to administer.
    #[error("this is the last active administrator")]
    LastAdmin,
    #[error("no such service account")]
    ServiceAccountNotFound,
    #[error("no such session")]
    SessionNotFound,
    #[error("no such API key")]
    ApiKeyNotFound,
    /// Rather than grow without bound.
    #[error("there are {limit} live keys already, which is the most")]
    TooManyKeys { limit: u32 },
    /// An API key called what only its owner, logged in, may do.
    #[error("an API key may not do this: log in")]
    SessionRequired,
    /// What a user asked a gateway for is for users of other tiers.
    #[error("this is not for users of this tier")]
    TierNotAllowed,
    /// What an API key asked a gateway for needs a scope that it does not have.
    #[error("the API key lacks the scope {0}")]
    ApiKeyScopeMissing(String),
    #[error("an account with this e-mail address or username exists")]
    AccountExists,
    #[error("a service account of this name exists")]
    ServiceAccountExists,
    #[error("the watch fell too far behind")]
    WatchTooSlow,
    #[error("the event id was recorded before with another payload")]
    EventConflict,
    #[error("a month's total would be more than can be counted")]
    TotalOutOfRange,
    #[error("no such credits")]
    CreditNotFound,
    #[error("the request id was used before for another grant")]
    CreditConflict,
    /// Rather than grow without bound.
    #[error("the user has {limit} live credits already, which is the most")]
    TooManyCredits { limit: u32 },
    #[error("fewer tokens{} are left this month than wanted", .0.of_model())]
    QuotaExceeded(Box<QuotaExceeded>),
    #[error("one request may use at most {limit} tokens")]
    RequestTooLarge { limit: i64 },
    #[error("more than {limit} requests a minute")]
    RateLimited { limit: i64, retry_after: Duration },
    /// Rather than grow without bound.
    #[error("too many reservations are open, retry after {:?}", in_brief(*retry_after))]
    TooManyReservations { retry_after: Duration },
    #[error("this is no reservation of this service")]
    ReservationInvalid,
    #[error("the reservation has ended")]
    ReservationEnded,
    /// Nowhere to send it: nothing that needs it may begin.
    #[error("no mails are sent here")]
    MailNotConfigured,
    #[error("the e-mail address has to be verified first")]
    EmailUnverified,
    /// Malformed, used, expired, superseded, for something else: one answer for all.
    #[error("the token is not valid")]
    OneTimeTokenInvalid,
    #[error("a mail was sent a moment ago, retry after {:?}", in_brief(*retry_after))]
    MailTooSoon { retry_after: Duration },
    /// Somebody is guessing, or mistypes.
    #[error("too many failed attempts, retry after {:?}", in_brief(*retry_after))]
    Throttled { retry_after: Duration },
    #[error("too much work is waiting, retry after {:?}", in_brief(*retry_after))]
    Overloaded { retry_after: Duration },
    /// Wrong, too old, or used before: one answer for all.
    #[error("the code is wrong or was used before")]
    MfaCodeInvalid,
    /// Not ours, expired, used, or outdated by what changed since.
    #[error("the challenge is not good any more: log in again")]
    MfaChallengeInvalid,
    #[error("there is a second factor already")]
    MfaAlreadyEnabled,
    #[error("there is no second factor")]
    MfaNotEnabled,
    #[error("the database is unavailable")]
    Unavailable(#[source] Cause),
    #[error("internal error")]
    Internal(#[source] Cause),
}

/// An underlying error, for the log only: driver text and SQL never leave the process.
pub type Cause = Box<dyn StdError + Send + Sync>;

/// A time to wait as people read it: whole seconds, or milliseconds of less than one; rounded up.
fn in_brief(wait: Duration) -> Duration {
    let millis = wait.as_nanos().div_ceil(1_000_000);
    let millis = u64::try_from(millis).unwrap_or(u64::MAX);
    match millis {
        0..1_000 => Duration::from_millis(millis),
        _ => Duration::from_secs(millis.div_ceil(1_000)),
    }
}

/// An error and all that caused it.
pub fn in_one_line(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    // Postgres gives details and hints lines of their own.
    text.lines().collect::<Vec<_>>().join("; ")
}

impl Error {
    /// As it is written to the log, with its causes: they never leave the process.
    pub fn with_causes(&self) -> String {
        in_one_line(self)
    }

    /// An invalid value of one field.
    pub fn invalid(field: impl Into<String>, description: impl Into<Violation>) -> Self {
        Self::Invalid(Violations(vec![FieldViolation {
            field: field.into(),
            description: description.into(),
        }]))
    }

    pub fn internal(cause: impl Into<Cause>) -> Self {
        Self::Internal(cause.into())
    }
}

/// Which credential of a call is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// The caller's own, from the `authorization` metadata.
    Authorization,
    /// The token that a service asked about.
    Token,
    /// The refresh token of `RefreshTokens`.
    RefreshToken,
}

impl Credential {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Authorization => "authorization",
            Self::Token => "token",
            Self::RefreshToken => "refresh_token",
        }
    }
}

impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Authorization => "caller's credential",
            Self::Token => "token",
            Self::RefreshToken => "refresh token",
        })
    }
}

/// Why a credential is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not ours, malformed or altered.
    #[error("is not valid")]
    Invalid,
    #[error("has expired")]
    Expired,
    /// Logged out, revoked or past its limit.
    #[error("belongs to a session that has ended")]
    SessionEnded,
    #[error("belongs to a disabled account")]
    AccountDisabled,
    /// A refresh token of an old generation: two parties hold the session.
    #[error("was used before; the session has been revoked")]
    Reused,
}

/// What is wrong with each field of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Violations(pub Vec<FieldViolation>);

#[derive(Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path from the request message, such as `event.tokens.input`.
    pub field: String,
    pub description: Violation,
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, FieldViolation { field, description }) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{field} {description}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_told_why_and_nobody_else() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = Error::Unavailable(refused.into());
        assert_eq!(error.to_string(), "the database is unavailable");
        assert_eq!(
            error.with_causes(),
            "the database is unavailable: connection refused"
        );
        let hinted = Error::Unavailable("refused\nHINT: ask again".into());
        assert_eq!(
            hinted.with_causes(),
            "the database is unavailable: refused; HINT: ask again"
        );
    }

    #[test]
    fn a_wait_is_told_in_few_digits_and_never_too_short() {
        for (nanos, told) in [
            (0, "0ns"),
            (1, "1ms"),
            (915_664_523, "916ms"),
            (999_000_001, "1s"),
            (1_000_000_001, "2s"),
            (899_999_000_000, "900s"),
        ] {
            let retry_after = Duration::from_nanos(nanos);
            let said = Error::Throttled { retry_after }.to_string();
            assert_eq!(
                said,
                format!("too many failed attempts, retry after {told}")
            );
        }
    }
}
