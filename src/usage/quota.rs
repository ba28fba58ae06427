//! Whether more may be used.

use chrono::{DateTime, Utc};

use super::Usage;
use crate::{
    error::{Error, Result},
    model::{Period, QuotaStanding, TierLimits, TierName, UserId, UserStanding},
};

/// The answer to a wish for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Allowed,
    /// Fewer are left this month than wanted, or none.
    MonthlyLimit,
    /// More than the tier allows in one request.
    RequestTooLarge,
}

impl Usage {
    /// How much of the current month a user has used and may still use.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn quota(
        &self,
        user_id: UserId,
        tier: &TierName,
        now: DateTime<Utc>,
    ) -> Result<QuotaStanding> {
        let tiers = self.tiers();
        let limits = tiers.limits_of(tier);
        let period = Period::containing(now);
        let used_tokens = self.store.usage_month_tokens(user_id, period).await?;
        Ok(QuotaStanding {
            period,
            tier: tier.clone(),
            limit_tokens: limits.monthly_tokens,
            used_tokens,
        })
    }

    /// Says whether a user may use `wanted` more tokens now. Consumes nothing.
    ///
    /// # Errors
    /// `AccountDisabled` · those of [`Usage::quota`]
    pub async fn check_quota(
        &self,
        user: &UserStanding,
        wanted: i64,
        now: DateTime<Utc>,
    ) -> Result<(Decision, QuotaStanding)> {
        if !user.is_active {
            return Err(Error::AccountDisabled);
        }
        let standing = self.quota(user.id, &user.tier, now).await?;
        Ok((
            decide(self.tiers().limits_of(&user.tier), &standing, wanted),
            standing,
        ))
    }
}

/// Usage equal to the limit is refused: a wish for nothing asks whether anything is left.
fn decide(limits: &TierLimits, standing: &QuotaStanding, wanted: i64) -> Decision {
    if limits.max_request_tokens.is_some_and(|max| wanted > max) {
        return Decision::RequestTooLarge;
    }
    match standing.remaining_tokens() {
        Some(remaining) if remaining < wanted.max(1) => Decision::MonthlyLimit,
        _ => Decision::Allowed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decision(limit: Option<i64>, max: Option<i64>, used: i64, wanted: i64) -> Decision {
        let name: crate::model::TierName = "free".parse().expect("valid");
        let limits = TierLimits {
            name: name.clone(),
            monthly_tokens: limit,
            models: Default::default(),
            requests_per_minute: None,
            max_request_tokens: max,
            on_outage: crate::model::OnOutage::Closed,
            thresholds: Vec::new(),
        };
        let standing = QuotaStanding {
            period: "2026-11".parse().expect("valid"),
            tier: name,
            limit_tokens: limit,
            used_tokens: used,
        };
        decide(&limits, &standing, wanted)
    }

    #[test]
    fn the_last_token_can_be_used_and_no_more() {
        assert_eq!(decision(Some(100), None, 99, 1), Decision::Allowed);
        assert_eq!(decision(Some(100), None, 99, 2), Decision::MonthlyLimit);
        assert_eq!(decision(Some(100), None, 100, 0), Decision::MonthlyLimit);
        assert_eq!(decision(Some(100), None, 150, 0), Decision::MonthlyLimit);
        assert_eq!(decision(Some(0), None, 0, 0), Decision::MonthlyLimit);
        assert_eq!(
            decision(Some(100), Some(10), 0, 11),
            Decision::RequestTooLarge
        );
        assert_eq!(decision(None, None, i64::MAX, i64::MAX), Decision::Allowed);
    }

    proptest! {
        #[test]
        fn what_is_allowed_fits(limit in 0_i64.., used in 0_i64.., wanted in 0_i64..) {
            let allowed = decision(Some(limit), None, used, wanted) == Decision::Allowed;
            prop_assert_eq!(allowed, i128::from(used) + i128::from(wanted.max(1)) <= i128::from(limit));
        }
    }
}
