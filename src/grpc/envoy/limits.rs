//! How clients are told what they may still use: the fields of draft-ietf-httpapi-ratelimit-headers-10.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::Said;
use crate::{
    error::Error,
    model::{QuotaState, Tokens},
};

/// Most that a structured field can say (RFC 9651 §3.3.1).
const MAX_INTEGER: i64 = 999_999_999_999_999;

/// A limit, and how it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) policy: &'static str,
    pub(super) unit: Unit,
    pub(super) quota: i64,
    pub(super) remaining: i64,
    pub(super) window: Duration,
    pub(super) resets_in: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Tokens,
    Requests,
}

impl Limit {
    /// A month's tokens; `None`: unlimited.
    pub(super) fn monthly(quota: &QuotaState, of_model: bool, now: DateTime<Utc>) -> Option<Self> {
        let (start, end) = (quota.period.start(), quota.period.end());
        Some(Self {
            policy: if of_model {
                "monthly-tokens-of-model"
            } else {
                "monthly-tokens"
            },
            unit: Unit::Tokens,
            quota: quota.limit?,
            remaining: free(quota)?,
            window: (end - start).to_std().unwrap_or_default(),
            resets_in: (end - now).to_std().unwrap_or_default(),
        })
    }

    /// The limit that an error is about.
    pub(super) fn exceeded(error: &Error, now: DateTime<Utc>) -> Option<Self> {
        match error {
            Error::QuotaExceeded(exceeded) => {
                Self::monthly(&exceeded.quota, exceeded.model.is_some(), now)
            }
            Error::RateLimited { limit, retry_after } => Some(Self {
                policy: "requests-per-minute",
                unit: Unit::Requests,
                quota: *limit,
                remaining: 0,
                window: Duration::from_mins(1),
                resets_in: *retry_after,
            }),
            _ => None,
        }
    }

    /// `RateLimit-Policy` and `RateLimit`.
    pub(super) fn headers(&self) -> [Said; 2] {
        // Formatting takes three times as long, and this is for every request of somebody else's.
        let mut digits = [itoa::Buffer::new(); 4];
        let [quota, window, remaining, resets_in] = &mut digits;
        let quota = quota.format(self.quota.min(MAX_INTEGER));
        let window = window.format(self.window.as_secs());
        let remaining = remaining.format(self.remaining.min(MAX_INTEGER));
        let resets_in = resets_in.format(seconds(self.resets_in));
        let policy = self.policy;
        let unit = match self.unit {
            Unit::Tokens => ";qu=\"tokens\"",
            // The unit of a policy that names none.
            Unit::Requests => "",
        };
        [
            (
                "ratelimit-policy",
                ["\"", policy, "\";q=", quota, unit, ";w=", window].concat(),
            ),
            (
                "ratelimit",
                ["\"", policy, "\";r=", remaining, ";t=", resets_in].concat(),
            ),
        ]
    }
}

/// What may still be used: what is held for others is not to be had. `None`: unlimited.
fn free(quota: &QuotaState) -> Option<Tokens> {
    Some(quota.remaining?.saturating_sub(quota.held).max(0))
}

/// How a quota stands, exactly. Of what is unlimited nothing is said.
pub(super) fn quota_facts(quota: &QuotaState) -> impl Iterator<Item = Said> + use<> {
    let number = |name, tokens: Option<i64>| Some((name, tokens?.to_string()));
    let facts = [
        Some(("month", quota.period.to_string())),
        number("limit_tokens", quota.limit),
        number("remaining_tokens", free(quota)),
    ];
    facts.into_iter().flatten()
}

/// Whole seconds, so that whoever waits so long is not too early.
pub(super) fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Period;

    fn quota(limit: Option<i64>, used: i64, held: i64) -> QuotaState {
        QuotaState {
            period: "2026-11".parse::<Period>().expect("valid"),
            tier: "free".parse().expect("valid"),
            limit,
            used,
            held,
            remaining: limit.map(|limit| (limit - used).max(0)),
        }
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("valid")
    }

    #[test]
    fn a_month_is_told_with_what_is_really_left() {
        let now = at("2026-11-30T23:59:00.5Z");
        let limit = Limit::monthly(&quota(Some(1000), 300, 200), false, now).expect("limited");
        let [(_, policy), (_, standing)] = limit.headers();
        assert_eq!(policy, "\"monthly-tokens\";q=1000;qu=\"tokens\";w=2592000");
        assert_eq!(standing, "\"monthly-tokens\";r=500;t=60");
        let facts: Vec<_> = quota_facts(&quota(Some(1000), 300, 200)).collect();
        assert!(facts.contains(&("remaining_tokens", "500".to_owned())));
        assert_eq!(Limit::monthly(&quota(None, 300, 0), false, now), None);
    }

    #[test]
    fn numbers_that_the_fields_cannot_say_saturate() {
        let now = at("2026-11-01T00:00:00Z");
        let limit = Limit::monthly(&quota(Some(1_000_000_000_000_000), 0, 0), true, now);
        let [(_, policy), (_, standing)] = limit.expect("limited").headers();
        assert!(policy.contains(";q=999999999999999;"), "{policy}");
        assert!(standing.contains(";r=999999999999999;"), "{standing}");
    }

    #[test]
    fn a_minute_is_told_in_requests() {
        let error = Error::RateLimited {
            limit: 60,
            retry_after: Duration::from_millis(1001),
        };
        let limit = Limit::exceeded(&error, Utc::now()).expect("a limit");
        let [(_, policy), (_, standing)] = limit.headers();
        assert_eq!(policy, "\"requests-per-minute\";q=60;w=60");
        assert_eq!(standing, "\"requests-per-minute\";r=0;t=2");
    }
}
