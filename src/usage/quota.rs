//! Whether more may be used, and who may use more.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::Usage;
use crate::{
    error::{Error, Result},
    model::{
        CreditGrant, CreditId, ModelName, MonthlyOverride, NewCredit, Origin, Page, PageRequest,
        Period, QuotaStanding, UserId, UserStanding,
    },
};

/// Credits of one user that may still give something: all are read for every decision.
const MAX_CREDITS: u32 = 200;

/// The answer to a wish for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Allowed,
    /// Fewer are left this month than wanted, or none.
    MonthlyLimit,
    /// As `MonthlyLimit`, of those of the model.
    ModelLimit,
    /// More than the tier allows in one request.
    RequestTooLarge,
}

impl Usage {
    /// How much of the current month a user has used and may still use, and why.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn quota(&self, user_id: UserId, now: DateTime<Utc>) -> Result<QuotaStanding> {
        let tiers = self.tiers();
        let period = Period::containing(now);
        let facts = self.store.quota_facts(user_id, period, &tiers).await?;
        Ok(QuotaStanding::new(facts, &tiers))
    }

    /// Says whether a user may use `wanted` more tokens, of the model if one is named, now. Consumes
    /// nothing.
    ///
    /// # Errors
    /// `AccountDisabled` · those of [`Usage::quota`]
    pub async fn check_quota(
        &self,
        user: &UserStanding,
        wanted: i64,
        model: Option<&ModelName>,
        now: DateTime<Utc>,
    ) -> Result<(Decision, QuotaStanding)> {
        if !user.is_active {
            return Err(Error::AccountDisabled);
        }
        let standing = self.quota(user.id, now).await?;
        Ok((decide(&standing, wanted, model), standing))
    }

    /// Notes how a user stands, before the tier changes: what was used under the limit of now stays
    /// paid for under a smaller one.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn before_tier_change(&self, user_id: UserId) -> Result<()> {
        self.store.quota_record(user_id, &self.tiers()).await
    }

    /// Gives a user a monthly limit of their own, in place of the tier's and of any before.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn set_override(
        &self,
        user_id: UserId,
        new: &MonthlyOverride,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<QuotaStanding> {
        let store = &self.store;
        store
            .quota_override_set(user_id, new, reason, &self.tiers(), origin)
            .await?;
        self.quota(user_id, now).await
    }

    /// Takes a user's own limit away. Without one it changes nothing.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn clear_override(
        &self,
        user_id: UserId,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<QuotaStanding> {
        let store = &self.store;
        store
            .quota_override_clear(user_id, reason, &self.tiers(), origin)
            .await?;
        self.quota(user_id, now).await
    }

    /// Grants credits. The same request again answers the grant that it made, as it stands now.
    ///
    /// # Errors
    /// `CreditConflict` when the request made another grant · `TooManyCredits` · `UserNotFound` ·
    /// `Unavailable`
    pub async fn grant_credits(&self, new: &NewCredit, origin: &Origin) -> Result<CreditGrant> {
        self.store
            .credit_grant(new, MAX_CREDITS, &self.tiers(), origin)
            .await
    }

    /// Lists what was granted to a user, newest first.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn credits(
        &self,
        user_id: UserId,
        page: &PageRequest<Uuid>,
        now: DateTime<Utc>,
    ) -> Result<Page<CreditGrant>> {
        let tiers = self.tiers();
        self.store.credit_list(user_id, page, &tiers, now).await
    }

    /// Takes back what is left of credits. Those that give nothing more stay as they are.
    ///
    /// # Errors
    /// `CreditNotFound` · `Unavailable`
    pub async fn void_credits(
        &self,
        id: CreditId,
        reason: &str,
        origin: &Origin,
    ) -> Result<CreditGrant> {
        let tiers = self.tiers();
        self.store.credit_void(id, reason, &tiers, origin).await
    }

    /// Closes credits that have expired; returns of how many users. Nobody waits for it: they give
    /// nothing more as it is.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn close_expired_credits(&self, limit: i64) -> Result<usize> {
        let users = self.store.credit_expired_users(limit).await?;
        let mut closed = Ok(users.len());
        for user_id in users {
            // What is wrong with one user's rows keeps none of the others waiting.
            if let Err(error) = self.store.quota_record(user_id, &self.tiers()).await {
                closed = Err(error);
            }
        }
        closed
    }
}

/// Usage equal to the limit is refused: a wish for nothing asks whether anything is left.
fn decide(standing: &QuotaStanding, wanted: i64, model: Option<&ModelName>) -> Decision {
    if standing.max_request_tokens.is_some_and(|max| wanted > max) {
        return Decision::RequestTooLarge;
    }
    let fits = |remaining: Option<i64>| remaining.is_none_or(|left| left >= wanted.max(1));
    if !fits(standing.remaining_tokens()) {
        return Decision::MonthlyLimit;
    }
    if !fits(model.and_then(|model| standing.remaining_of_model(model))) {
        return Decision::ModelLimit;
    }
    Decision::Allowed
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{LimitFacts, OnOutage, TierLimits, Tiers};

    fn standing(limit: Option<i64>, max: Option<i64>, used: i64) -> QuotaStanding {
        let name: crate::model::TierName = "free".parse().expect("valid");
        let model: ModelName = "small".parse().expect("valid");
        let tiers = Tiers {
            all: vec![TierLimits {
                name: name.clone(),
                monthly_tokens: limit,
                models: BTreeMap::from([(model.clone(), 10)]),
                requests_per_minute: None,
                max_request_tokens: max,
                on_outage: OnOutage::Closed,
                thresholds: Vec::new(),
            }],
            default: 0,
        };
        let period: Period = "2026-11".parse().expect("valid");
        let facts = LimitFacts {
            user_id: UserId::new(),
            period,
            now: period.start(),
            tier: name,
            override_: None,
            recorded_base: None,
            used,
            used_by_model: BTreeMap::from([(model, 4)]),
            credits: Vec::new(),
            past: Vec::new(),
        };
        QuotaStanding::new(facts, &tiers)
    }

    fn decision(limit: Option<i64>, max: Option<i64>, used: i64, wanted: i64) -> Decision {
        decide(&standing(limit, max, used), wanted, None)
    }

    #[test]
    fn a_model_has_a_limit_of_its_own_beside_that_of_all() {
        let of = |limit, model: &str, wanted| {
            let model = model.parse().expect("valid");
            decide(&standing(Some(limit), None, 50), wanted, Some(&model))
        };
        assert_eq!(of(100, "small", 6), Decision::Allowed);
        assert_eq!(of(100, "small", 7), Decision::ModelLimit);
        assert_eq!(of(100, "large", 7), Decision::Allowed);
        assert_eq!(of(55, "small", 6), Decision::MonthlyLimit);
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
