//! Messages about quota, overrides and credits.

use chrono::{DateTime, TimeDelta, Utc};
use prost_types::Timestamp;

use super::{
    convert::{Fields, time, timestamp, token_count},
    wire::{self, Writer},
};
use crate::{
    model::{
        BaseSource, CreditGrant, MonthlyOverride, NewCredit, QuotaStanding, QuotaState, TierLimits,
        UserId, Violation,
    },
    proto::tollkeeper::{
        admin::v1::{self as admin, set_quota_override_request::Limit},
        usage::v1::{
            self as usage, check_quota_response, get_quota_response::BaseSource as Source,
        },
    },
    usage::{Decision, QuotaWish},
};

/// Longest time that an override or a credit may be good for, unless for ever.
const MAX_LIFETIME: TimeDelta = TimeDelta::days(3653);

const MAX_PRIORITY: i32 = 1000;

/// A remark for the audit trail.
pub(super) fn reason(text: &str) -> Result<&str, Violation> {
    if text.chars().count() > 500 {
        Err("must be at most 500 characters".into())
    } else if text.contains('\0') {
        Err("must not hold a NUL character".into())
    } else {
        Ok(text)
    }
}

/// Reads whose limit is to be what, and why.
pub(super) fn new_override<'a>(
    fields: &mut Fields,
    request: &'a admin::SetQuotaOverrideRequest,
    now: DateTime<Utc>,
) -> Option<(UserId, MonthlyOverride, &'a str)> {
    let user_id = fields.parse("user_id", &request.user_id);
    let monthly_tokens = match request.limit {
        Some(Limit::MonthlyTokens(tokens)) => fields
            .take("monthly_tokens", tokens_from(0, tokens))
            .map(Some),
        Some(Limit::Unlimited(())) => Some(None),
        None => fields.take("limit", Err("must hold monthly_tokens or unlimited".into())),
    };
    let expires_at = fields.take("expires_at", expiry(request.expires_at, now, now));
    let reason = fields.take("reason", reason(&request.reason));
    let new = MonthlyOverride {
        monthly_tokens: monthly_tokens?,
        expires_at: expires_at?,
    };
    Some((user_id?, new, reason?))
}

/// Reads what is to be granted, to expire after `after` if ever.
pub(super) fn new_credit(
    fields: &mut Fields,
    request: &admin::GrantCreditsRequest,
    after: DateTime<Utc>,
    now: DateTime<Utc>,
) -> Option<NewCredit> {
    let user_id = fields.parse("user_id", &request.user_id);
    let tokens = fields.take("tokens", tokens_from(1, request.tokens));
    let priority = if (0..=MAX_PRIORITY).contains(&request.priority) {
        Ok(request.priority)
    } else {
        Err(format!("must be 0 to {MAX_PRIORITY}").into())
    };
    let priority = fields.take("priority", priority);
    let expires_at = fields.take("expires_at", expiry(request.expires_at, after, now));
    let reason = fields.take("reason", reason(&request.reason));
    let request_id = fields.parse("request_id", &request.request_id);
    Some(NewCredit {
        user_id: user_id?,
        tokens: tokens?,
        priority: priority?,
        expires_at: expires_at?,
        reason: reason?.to_owned(),
        request_id: request_id?,
    })
}

fn tokens_from(min: i64, tokens: i64) -> Result<i64, Violation> {
    if (min..=TierLimits::MAX_TOKENS).contains(&tokens) {
        Ok(tokens)
    } else {
        Err(format!("must be {min} to {}", TierLimits::MAX_TOKENS).into())
    }
}

/// Reads when something ends, after `after`; unset means never.
fn expiry(
    value: Option<Timestamp>,
    after: DateTime<Utc>,
    now: DateTime<Utc>,
) -> Result<Option<DateTime<Utc>>, Violation> {
    if value.is_none() {
        return Ok(None);
    }
    let at = timestamp(value)?;
    if at > after && at <= now + MAX_LIFETIME {
        Ok(Some(at))
    } else {
        Err("must be ahead of now, at most ten years".into())
    }
}

impl From<QuotaState> for usage::Quota {
    fn from(state: QuotaState) -> Self {
        Self {
            month: state.period.to_string(),
            limit_tokens: state.limit.unwrap_or_default(),
            unlimited: state.limit.is_none(),
            used_tokens: state.used,
            remaining_tokens: state.remaining.unwrap_or_default(),
            resets_at: Some(time(state.period.end())),
            tier: state.tier.into_string(),
            held_tokens: state.held,
        }
    }
}

/// Writes a [`usage::Quota`].
pub(super) fn write(state: &QuotaState, out: &mut Writer<'_>) {
    out.shown(1, state.period);
    out.number(2, state.limit.unwrap_or_default());
    out.number(3, state.limit.is_none());
    out.number(4, state.used);
    out.number(5, state.remaining.unwrap_or_default());
    out.time(6, state.period.end());
    out.text(7, state.tier.as_str());
    out.number(8, state.held);
}

impl From<&QuotaStanding> for usage::Quota {
    fn from(standing: &QuotaStanding) -> Self {
        standing.state().into()
    }
}

/// A `CheckQuotaRequest`, where it lies in the message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked<'a> {
    user_id: &'a str,
    tokens: i64,
    model: &'a str,
}

impl<'a> From<&'a usage::CheckQuotaRequest> for Asked<'a> {
    fn from(request: &'a usage::CheckQuotaRequest) -> Self {
        Self {
            user_id: &request.user_id,
            tokens: request.tokens,
            model: &request.model,
        }
    }
}

impl<'a> Asked<'a> {
    /// Reads it, if it is one that [`wire`] reads.
    pub(super) fn read(message: &'a [u8]) -> Option<Self> {
        let (mut user_id, mut tokens, mut model) = (None, None, None);
        wire::read(message, |number, value| match number {
            1 => wire::once(&mut user_id, value.text()),
            2 => wire::once(&mut tokens, value.number()),
            3 => wire::once(&mut model, value.text()),
            _ => Some(()),
        })?;
        Some(Self {
            user_id: user_id.unwrap_or_default(),
            tokens: tokens.unwrap_or_default().cast_signed(),
            model: model.unwrap_or_default(),
        })
    }
}

/// Reads what may be used.
pub(super) fn check(fields: &mut Fields, asked: &Asked<'_>) -> Option<(UserId, QuotaWish)> {
    let user_id = fields.parse("user_id", asked.user_id);
    let tokens = fields.take("tokens", token_count(asked.tokens));
    let model = fields.parse_optional("model", asked.model);
    let wish = QuotaWish {
        tokens: tokens?,
        model: model?,
    };
    Some((user_id?, wish))
}

impl From<Decision> for check_quota_response::Decision {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Allowed => Self::Allowed,
            Decision::MonthlyLimit => Self::MonthlyLimit,
            Decision::ModelLimit => Self::ModelLimit,
            Decision::RequestTooLarge => Self::RequestTooLarge,
        }
    }
}

impl From<(Decision, Option<QuotaState>)> for usage::CheckQuotaResponse {
    fn from((decision, quota): (Decision, Option<QuotaState>)) -> Self {
        Self {
            decision: check_quota_response::Decision::from(decision).into(),
            quota: quota.map(Into::into),
        }
    }
}

/// Writes a [`usage::CheckQuotaResponse`].
pub(super) fn write_checked(decision: Decision, quota: Option<&QuotaState>, out: &mut Writer<'_>) {
    out.number(1, i32::from(check_quota_response::Decision::from(decision)));
    if let Some(state) = quota {
        out.message(2, |out| write(state, out));
    }
}

/// A user's quota and where it comes from.
pub(super) fn answer(standing: &QuotaStanding) -> usage::GetQuotaResponse {
    let limit = &standing.limit;
    let (base_source, override_) = match limit.base_source {
        BaseSource::Tier => (Source::Tier, None),
        BaseSource::Override => (Source::Override, standing.facts.override_),
        BaseSource::Kept => (Source::Kept, None),
    };
    let credits = limit.credits.iter();
    let counting = credits.filter(|share| share.remaining > 0 || share.drawn_this_month > 0);
    let credits = counting.map(|share| usage::QuotaCredit {
        id: share.credit.id.to_string(),
        tokens: share.credit.tokens,
        drawn_tokens: share.drawn_this_month,
        remaining_tokens: share.remaining,
        expires_at: share.credit.expires_at.map(time),
    });
    let models = limit
        .models
        .iter()
        .map(|(model, tokens)| usage::ModelQuota {
            model: model.to_string(),
            limit_tokens: *tokens,
            used_tokens: standing.used_of_model(model),
            remaining_tokens: standing.remaining_of_model(model).unwrap_or_default(),
            held_tokens: standing.held_of(Some(model)),
        });
    usage::GetQuotaResponse {
        user_id: standing.facts.user_id.to_string(),
        quota: Some(standing.into()),
        base_tokens: limit.base.unwrap_or_default(),
        base_source: base_source.into(),
        override_expires_at: override_.and_then(|one| one.expires_at).map(time),
        credits: credits.collect(),
        models: models.collect(),
        requests_per_minute: standing.requests_per_minute,
        max_request_tokens: standing.max_request_tokens,
    }
}

impl From<CreditGrant> for admin::Credit {
    fn from(grant: CreditGrant) -> Self {
        Self {
            id: grant.id.to_string(),
            user_id: grant.user_id.to_string(),
            tokens: grant.tokens,
            remaining_tokens: grant.remaining,
            priority: grant.priority,
            granted_at: Some(time(grant.granted_at)),
            expires_at: grant.expires_at.map(time),
            voided_at: grant.voided_at.map(time),
            reason: grant.reason,
            request_id: grant.request_id.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn what_is_written_is_what_the_generated_code_writes() {
        let state = QuotaState {
            period: "2026-11".parse().expect("valid"),
            tier: "free".parse().expect("valid"),
            limit: Some(1000),
            used: 10,
            held: 20,
            remaining: Some(990),
        };
        for quota in [None, Some(state)] {
            for decision in [
                Decision::Allowed,
                Decision::MonthlyLimit,
                Decision::ModelLimit,
                Decision::RequestTooLarge,
            ] {
                let mut written = Vec::new();
                write_checked(decision, quota.as_ref(), &mut Writer::new(&mut written));
                let generated = usage::CheckQuotaResponse::from((decision, quota.clone()));
                assert_eq!(written, generated.encode_to_vec());
            }
        }
    }

    #[test]
    fn what_is_read_where_it_lies_is_what_the_generated_code_reads() {
        let whole = usage::CheckQuotaRequest {
            user_id: "user".to_owned(),
            tokens: -7,
            model: "model".to_owned(),
        };
        for sent in [usage::CheckQuotaRequest::default(), whole.clone()] {
            let bytes = sent.encode_to_vec();
            assert_eq!(Asked::read(&bytes), Some(Asked::from(&sent)));
        }
        let twice = [whole.encode_to_vec(), whole.encode_to_vec()].concat();
        assert_eq!(Asked::read(&twice), None);
    }
}
