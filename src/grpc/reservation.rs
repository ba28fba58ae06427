//! Messages about reservations.

use std::time::Duration;

use prost::Message as _;

use super::{
    convert::{Fields, labels, time, token_counts},
    quota,
    wire::{self, Writer},
};
use crate::{
    model::{Labels, TokenCounts, UserId, Violation},
    proto::tollkeeper::usage::v1::{
        CommitReservationRequest, CommitReservationResponse, ReserveQuotaRequest,
        ReserveQuotaResponse, commit_reservation_response::Outcome, reserve_quota_request::Mode,
    },
    usage::{Committed, QuotaRequest, Recorded, Reserved, lease},
};

pub(super) const DEFAULT_LIFETIME: Duration = Duration::from_mins(2);
const MAX_LIFETIME: Duration = Duration::from_hours(1);

/// A `ReserveQuotaRequest`, where it lies in the message.
#[derive(Debug, PartialEq)]
pub(super) struct Asked<'a> {
    user_id: &'a str,
    request_id: &'a str,
    model: &'a str,
    tokens: i64,
    mode: i32,
    lifetime: Option<prost_types::Duration>,
}

impl<'a> From<&'a ReserveQuotaRequest> for Asked<'a> {
    fn from(request: &'a ReserveQuotaRequest) -> Self {
        Self {
            user_id: &request.user_id,
            request_id: &request.request_id,
            model: &request.model,
            tokens: request.tokens,
            mode: request.mode,
            lifetime: request.lifetime,
        }
    }
}

impl<'a> Asked<'a> {
    /// Reads it, if it is one that [`wire`] reads.
    pub(super) fn read(message: &'a [u8]) -> Option<Self> {
        let (mut user_id, mut request_id, mut model) = (None, None, None);
        let (mut tokens, mut mode, mut lifetime) = (None, None, None);
        wire::read(message, |number, value| match number {
            1 => wire::once(&mut user_id, value.text()),
            2 => wire::once(&mut request_id, value.text()),
            3 => wire::once(&mut model, value.text()),
            4 => wire::once(&mut tokens, value.number()),
            5 => wire::once(&mut mode, value.number()),
            6 => wire::once(&mut lifetime, value.bytes()),
            _ => Some(()),
        })?;
        let lifetime = lifetime.map(prost_types::Duration::decode);
        Some(Self {
            user_id: user_id.unwrap_or_default(),
            request_id: request_id.unwrap_or_default(),
            model: model.unwrap_or_default(),
            tokens: tokens.unwrap_or_default().cast_signed(),
            mode: i32::try_from(mode.unwrap_or_default()).ok()?,
            lifetime: lifetime.transpose().ok()?,
        })
    }
}

/// Reads who is to use how much.
pub(super) fn request(fields: &mut Fields, request: &Asked<'_>) -> Option<(UserId, QuotaRequest)> {
    let user_id = fields.parse("user_id", request.user_id);
    let request_id = fields.parse("request_id", request.request_id);
    let model = fields.parse("model", request.model);
    let tokens = match request.tokens {
        tokens @ 1..=TokenCounts::MAX => Ok(tokens),
        _ => Err(format!("must be 1 to {}", TokenCounts::MAX).into()),
    };
    let tokens = fields.take("tokens", tokens);
    let mode = match Mode::try_from(request.mode) {
        Ok(Mode::Unspecified | Mode::AllOrNothing) => Ok(lease::Mode::AllOrNothing),
        Ok(Mode::BestEffort) => Ok(lease::Mode::BestEffort),
        Ok(Mode::LookOnly) => Ok(lease::Mode::LookOnly),
        Err(_) => Err("must be a mode".into()),
    };
    let mode = fields.take("mode", mode);
    let lifetime = fields.take("lifetime", lifetime(request.lifetime));
    let request = QuotaRequest {
        request_id: request_id?,
        model: model?,
        tokens: tokens?,
        mode: mode?,
        lifetime: lifetime?,
    };
    Some((user_id?, request))
}

/// Reads how long tokens are to be held.
pub(super) fn lifetime(value: Option<prost_types::Duration>) -> Result<Duration, Violation> {
    let Some(value) = value else {
        return Ok(DEFAULT_LIFETIME);
    };
    bounded(Duration::try_from(value).ok())
}

/// As [`lifetime`], of a text such as `90s`.
pub(super) fn lifetime_from(text: &str) -> Result<Duration, Violation> {
    bounded(humantime::parse_duration(text).ok())
}

fn bounded(lifetime: Option<Duration>) -> Result<Duration, Violation> {
    lifetime
        .filter(|lifetime| (Duration::from_secs(1)..=MAX_LIFETIME).contains(lifetime))
        .ok_or_else(|| "must be 1 second to 1 hour".into())
}

/// Reads what was used.
pub(super) fn used(
    fields: &mut Fields,
    request: CommitReservationRequest,
) -> Option<(String, TokenCounts, Labels)> {
    let tokens = token_counts(fields, "tokens", request.tokens);
    let labels = fields.take("labels", labels(request.labels.into_iter().collect()));
    Some((request.reservation, tokens?, labels?))
}

impl From<Reserved> for ReserveQuotaResponse {
    fn from(reserved: Reserved) -> Self {
        Self {
            reservation: reserved.handle.unwrap_or_default(),
            tokens: reserved.tokens,
            expires_at: reserved.expires_at.map(time),
            beyond_limit: reserved.quota.is_none(),
            quota: reserved.quota.map(Into::into),
        }
    }
}

/// Writes a [`ReserveQuotaResponse`].
pub(super) fn write(reserved: &Reserved, out: &mut Writer<'_>) {
    out.text(1, reserved.handle.as_deref().unwrap_or_default());
    out.number(2, reserved.tokens);
    if let Some(expires_at) = reserved.expires_at {
        out.time(3, expires_at);
    }
    if let Some(state) = &reserved.quota {
        out.message(4, |out| quota::write(state, out));
    }
    out.number(5, reserved.quota.is_none());
}

pub(super) fn committed(committed: Committed, event_id: String) -> CommitReservationResponse {
    let outcome = match committed {
        Committed::Booked(Recorded::Now) => Outcome::Recorded,
        Committed::Booked(Recorded::Before) => Outcome::Duplicate,
        Committed::Accepted => Outcome::Accepted,
    };
    CommitReservationResponse {
        outcome: outcome.into(),
        event_id,
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::{option, prelude::*};

    use super::*;
    use crate::model::{Period, QuotaState};

    #[test]
    fn what_is_read_where_it_lies_is_what_the_generated_code_reads() {
        let lifetime = prost_types::Duration {
            seconds: -1,
            nanos: 5,
        };
        let whole = ReserveQuotaRequest {
            user_id: "user".to_owned(),
            request_id: "request".to_owned(),
            model: "model".to_owned(),
            tokens: -7,
            mode: 3,
            lifetime: Some(lifetime),
        };
        for sent in [ReserveQuotaRequest::default(), whole.clone()] {
            let bytes = sent.encode_to_vec();
            assert_eq!(Asked::read(&bytes), Some(Asked::from(&sent)));
        }
        let twice = [whole.encode_to_vec(), whole.encode_to_vec()].concat();
        assert_eq!(Asked::read(&twice), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_the_generated_code_writes(
            handle in option::of("[A-Za-z0-9_-]{0,300}"),
            (tokens, used, held) in any::<(i64, i64, i64)>(),
            expires_at in option::of(0..4_000_000_000_000_000_i64),
            limit in option::of(any::<i64>()),
            tier in "[a-z]{1,32}",
            is_known in any::<bool>(),
        ) {
            let time = |micros| DateTime::from_timestamp_micros(micros).expect("in range");
            let reserved = Reserved {
                handle,
                tokens,
                expires_at: expires_at.map(time),
                quota: is_known.then(|| QuotaState {
                    period: Period::containing(time(expires_at.unwrap_or_default())),
                    tier: tier.parse().expect("valid"),
                    limit,
                    used,
                    held,
                    remaining: limit.map(|limit| limit.saturating_sub(used).max(0)),
                }),
            };
            let mut written = Vec::new();
            write(&reserved, &mut Writer::new(&mut written));
            let generated = ReserveQuotaResponse::from(reserved).encode_to_vec();
            prop_assert_eq!(written, generated);
        }
    }

    #[test]
    fn lifetimes_are_bounded() {
        let read = |seconds, nanos| lifetime(Some(prost_types::Duration { seconds, nanos })).ok();
        assert_eq!(lifetime(None).ok(), Some(DEFAULT_LIFETIME));
        assert_eq!(read(1, 0), Some(Duration::from_secs(1)));
        assert_eq!(read(3600, 0), Some(MAX_LIFETIME));
        for (seconds, nanos) in [(0, 999_999_999), (3600, 1), (-5, 0), (i64::MAX, 0)] {
            assert_eq!(read(seconds, nanos), None, "{seconds} {nanos}");
        }
    }
}
