//! From our errors to gRPC statuses, in one place.

use std::{collections::HashMap, time::Duration};

use chrono::{SecondsFormat, Utc};
use http::{Response, StatusCode};
use tonic::{Code, Status, body::Body};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    auth::RowFault,
    error::{Error, Fault, in_one_line},
    model::QuotaExceeded,
    proto::tollkeeper::error::v1::ErrorReason,
};

/// `ErrorInfo.domain` of every error.
const DOMAIN: &str = "tollkeeper";

/// How long to wait before trying again when the database or the server was away.
const OUTAGE_RETRY: Duration = Duration::from_secs(1);

impl From<Error> for Status {
    /// Logs what is the service's own fault; its cause never leaves the process.
    fn from(error: Error) -> Self {
        use ErrorReason as Reason;
        let message = error.to_string();
        match error {
            Error::Invalid(violations) => {
                let mut details = info(Reason::InvalidField, []);
                for violation in violations.0 {
                    details.add_bad_request_violation(violation.field, violation.description);
                }
                Self::with_error_details(Code::InvalidArgument, message, details)
            }
            Error::CredentialMissing => {
                status(Code::Unauthenticated, Reason::CredentialMissing, message)
            }
            Error::Refused { credential, fault } => {
                let reason = reason_of(fault);
                let details = info(reason, [("credential", credential.as_str())]);
                Self::with_error_details(Code::Unauthenticated, message, details)
            }
            Error::InvalidCredentials => {
                status(Code::Unauthenticated, Reason::InvalidCredentials, message)
            }
            Error::CallerNotAllowed => {
                status(Code::PermissionDenied, Reason::CallerNotAllowed, message)
            }
            Error::ScopeMissing(scope) => {
                let details = info(Reason::ScopeMissing, [("scope", scope.as_str())]);
                Self::with_error_details(Code::PermissionDenied, message, details)
            }
            Error::AccountDisabled => {
                status(Code::PermissionDenied, Reason::AccountDisabled, message)
            }
            Error::UserNotFound => status(Code::NotFound, Reason::UserNotFound, message),
            Error::LastAdmin => status(Code::FailedPrecondition, Reason::LastAdmin, message),
            Error::ServiceAccountNotFound => {
                status(Code::NotFound, Reason::ServiceAccountNotFound, message)
            }
            Error::SessionNotFound => status(Code::NotFound, Reason::SessionNotFound, message),
            Error::ApiKeyNotFound => status(Code::NotFound, Reason::ApiKeyNotFound, message),
            Error::TooManyKeys { limit } => {
                let details = info(Reason::TooManyKeys, [("limit", &*limit.to_string())]);
                Self::with_error_details(Code::FailedPrecondition, message, details)
            }
            Error::SessionRequired => {
                status(Code::PermissionDenied, Reason::SessionRequired, message)
            }
            Error::TierNotAllowed => {
                status(Code::PermissionDenied, Reason::TierNotAllowed, message)
            }
            Error::ApiKeyScopeMissing(scope) => {
                let details = info(Reason::ScopeMissing, [("scope", &*scope)]);
                Self::with_error_details(Code::PermissionDenied, message, details)
            }
            Error::AccountExists => status(Code::AlreadyExists, Reason::AccountExists, message),
            Error::ServiceAccountExists => {
                status(Code::AlreadyExists, Reason::ServiceAccountExists, message)
            }
            Error::WatchTooSlow => status(Code::ResourceExhausted, Reason::WatchTooSlow, message),
            Error::EventConflict => status(Code::AlreadyExists, Reason::EventConflict, message),
            Error::TotalOutOfRange => status(Code::OutOfRange, Reason::TotalOutOfRange, message),
            Error::CreditNotFound => status(Code::NotFound, Reason::CreditNotFound, message),
            Error::CreditConflict => status(Code::AlreadyExists, Reason::CreditConflict, message),
            Error::TooManyCredits { limit } => {
                let details = info(Reason::TooManyCredits, [("limit", &*limit.to_string())]);
                Self::with_error_details(Code::FailedPrecondition, message, details)
            }
            Error::QuotaExceeded(exceeded) => {
                Self::with_error_details(Code::ResourceExhausted, message, quota(&exceeded))
            }
            Error::RequestTooLarge { limit } => {
                let limit = limit.to_string();
                let details = info(Reason::RequestTooLarge, [("limit_tokens", &*limit)]);
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::RateLimited { limit, retry_after } => {
                let mut details = info(Reason::RateLimited, [("limit", &*limit.to_string())]);
                details.set_retry_info(Some(retry_after));
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::TooManyReservations { retry_after } => {
                let mut details = info(Reason::TooManyReservations, []);
                details.set_retry_info(Some(retry_after));
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::ReservationInvalid => {
                status(Code::InvalidArgument, Reason::ReservationInvalid, message)
            }
            Error::ReservationEnded => {
                status(Code::FailedPrecondition, Reason::ReservationEnded, message)
            }
            Error::MailNotConfigured => {
                status(Code::FailedPrecondition, Reason::MailNotConfigured, message)
            }
            Error::EmailUnverified => {
                status(Code::FailedPrecondition, Reason::EmailUnverified, message)
            }
            Error::OneTimeTokenInvalid => {
                status(Code::InvalidArgument, Reason::OneTimeTokenInvalid, message)
            }
            Error::MailTooSoon { retry_after } => {
                let mut details = info(Reason::MailTooSoon, []);
                details.set_retry_info(Some(retry_after));
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::Throttled { retry_after } => {
                let mut details = info(Reason::TooManyAttempts, []);
                details.set_retry_info(Some(retry_after));
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::Overloaded { retry_after } => {
                let mut details = info(Reason::Overloaded, []);
                details.set_retry_info(Some(retry_after));
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::MfaCodeInvalid => status(Code::Unauthenticated, Reason::MfaCodeInvalid, message),
            Error::MfaChallengeInvalid => {
                status(Code::Unauthenticated, Reason::MfaChallengeInvalid, message)
            }
            Error::MfaAlreadyEnabled => {
                status(Code::FailedPrecondition, Reason::MfaAlreadyEnabled, message)
            }
            Error::MfaNotEnabled => {
                status(Code::FailedPrecondition, Reason::MfaNotEnabled, message)
            }
            Error::Unavailable(cause) => {
                tracing::warn!(cause = %in_one_line(&*cause), "the database is unavailable");
                let mut details = info(Reason::DatabaseUnavailable, []);
                details.set_retry_info(Some(OUTAGE_RETRY));
                Self::with_error_details(Code::Unavailable, message, details)
            }
            Error::Internal(cause) => {
                tracing::error!(cause = %in_one_line(&*cause), "internal error");
                status(Code::Internal, Reason::Internal, message)
            }
        }
    }
}

/// Which limit of whom is exceeded, how it stands, and when it starts anew.
fn quota(exceeded: &QuotaExceeded) -> ErrorDetails {
    let QuotaExceeded {
        user_id,
        model,
        quota,
    } = exceeded;
    let resets_at = quota.period.end();
    let texts = [
        ("month", quota.period.to_string()),
        ("limit_tokens", quota.limit.unwrap_or_default().to_string()),
        ("used_tokens", quota.used.to_string()),
        ("held_tokens", quota.held.to_string()),
        (
            "remaining_tokens",
            quota.remaining.unwrap_or_default().to_string(),
        ),
        (
            "resets_at",
            resets_at.to_rfc3339_opts(SecondsFormat::Secs, true),
        ),
    ];
    let of_model = model.iter().map(|model| ("model", model.to_string()));
    let metadata = texts.into_iter().chain(of_model);
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
    let metadata: HashMap<_, _> = metadata.collect();
    let reason = short_name(ErrorReason::QuotaExceeded);
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    details.add_quota_failure_violation(
        format!("user:{user_id}"),
        format!("monthly tokens{}", exceeded.of_model()),
    );
    details.set_retry_info((resets_at - Utc::now()).to_std().ok());
    details
}

fn reason_of(fault: Fault) -> ErrorReason {
    match fault {
        Fault::Invalid => ErrorReason::CredentialInvalid,
        Fault::Expired => ErrorReason::CredentialExpired,
        Fault::SessionEnded => ErrorReason::SessionEnded,
        Fault::AccountDisabled => ErrorReason::AccountDisabled,
        Fault::Reused => ErrorReason::RefreshTokenReused,
    }
}

/// The name of a fault's reason, as `ErrorInfo` has it.
pub(super) fn reason_name(fault: Fault) -> &'static str {
    short_name(reason_of(fault))
}

/// The name of the reason, as `ErrorInfo` has it, for which an event is refused for good; `None` for
/// what is not its own fault. A fault of ours is logged.
pub(super) fn event_reason(error: &Error) -> Option<&'static str> {
    let reason = match error {
        Error::Invalid(_) => ErrorReason::InvalidField,
        Error::UserNotFound => ErrorReason::UserNotFound,
        Error::EventConflict => ErrorReason::EventConflict,
        Error::TotalOutOfRange => ErrorReason::TotalOutOfRange,
        Error::Internal(cause) => {
            tracing::error!(cause = %in_one_line(&**cause), "an event is refused by the database");
            ErrorReason::Internal
        }
        _ => return None,
    };
    Some(short_name(reason))
}

/// The name of the reason for which a row of an import is refused.
pub fn row_reason(fault: &RowFault) -> &'static str {
    short_name(match fault {
        RowFault::Invalid(_) => ErrorReason::InvalidField,
        RowFault::Taken(_) => ErrorReason::AccountExists,
        RowFault::Duplicate(_) => ErrorReason::DuplicateRow,
        RowFault::Conflict => ErrorReason::ImportConflict,
        RowFault::Erased => ErrorReason::UserErased,
    })
}

fn short_name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}

pub(super) fn unknown_method() -> Status {
    status(
        Code::Unimplemented,
        ErrorReason::UnknownMethod,
        "no such method",
    )
}

pub(super) fn deadline_exceeded() -> Status {
    status(
        Code::DeadlineExceeded,
        ErrorReason::DeadlineExceeded,
        "the call took too long",
    )
}

/// For a call that was still in flight at the end of the drain.
pub(super) fn shutting_down() -> Status {
    let mut details = info(ErrorReason::ShuttingDown, []);
    details.set_retry_info(Some(OUTAGE_RETRY));
    let message = "the server is shutting down";
    Status::with_error_details(Code::Unavailable, message, details)
}

/// For a request of another protocol: with a success of HTTP, other clients would take the error
/// for an answer (gRPC over HTTP/2, `Content-Type`).
pub(super) fn not_grpc() -> Response<Body> {
    let message = "the content type must be application/grpc";
    let status = status(
        Code::InvalidArgument,
        ErrorReason::MalformedRequest,
        message,
    );
    let mut response = status.into_http();
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response
}

/// For a handler that panicked.
pub(super) fn panicked() -> Status {
    status(Code::Internal, ErrorReason::Internal, "internal error")
}

/// Gives a status of the transport itself the details that every error has.
pub(super) fn explain(bare: &Status) -> Status {
    let (code, reason) = match bare.code() {
        // The router has nothing to say of an unknown method; of a compression the codec has.
        Code::Unimplemented if bare.message().is_empty() => return unknown_method(),
        // How the transport says that the client's own deadline passed.
        Code::Cancelled | Code::DeadlineExceeded => {
            (Code::DeadlineExceeded, ErrorReason::DeadlineExceeded)
        }
        // The transport says INTERNAL of a message it cannot decode; that is the client's fault.
        Code::Internal => (Code::InvalidArgument, ErrorReason::MalformedRequest),
        Code::Unavailable => (Code::Unavailable, ErrorReason::ShuttingDown),
        code => (code, ErrorReason::MalformedRequest),
    };
    status(code, reason, bare.message())
}

/// The same error with the id to quote to an operator, as `error_reason.proto` promises.
pub(super) fn with_request_id(error: &Status, request_id: &str) -> Status {
    let mut details = error.get_error_details();
    if let Some(mut info) = details.error_info().cloned() {
        info.metadata
            .insert("request_id".to_owned(), request_id.to_owned());
        details.set_error_info(info.reason, info.domain, info.metadata);
    }
    let metadata = error.metadata().clone();
    Status::with_error_details_and_metadata(error.code(), error.message(), details, metadata)
}

fn status(code: Code, reason: ErrorReason, message: impl Into<String>) -> Status {
    Status::with_error_details(code, message, info(reason, []))
}

fn info<const N: usize>(reason: ErrorReason, metadata: [(&str, &str); N]) -> ErrorDetails {
    let name = short_name(reason);
    let metadata: HashMap<String, String> = metadata
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    ErrorDetails::with_error_info(name, DOMAIN, metadata)
}
