//! Whether more may be used, and who may use more.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{
    Usage,
    keeper::{Reservation, Standing, Wish},
    lease::{Boot, Mode, RequestKey},
    reservations::{denial, may_ask},
};
use crate::{
    error::{Error, Result},
    model::{
        CreditGrant, CreditId, MeterName, ModelName, MonthlyOverride, NewCredit, Origin, Page,
        PageRequest, Period, QuotaStanding, QuotaState, TierLimits, Tokens, UserId, UserStanding,
    },
};

/// Credits of one user that may still give something: all are read for every decision.
const MAX_CREDITS: u32 = 200;

/// Users whose months are looked at together.
const SETTLE_BATCH: i64 = 500;

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

/// What somebody would like to use.
#[derive(Clone, Debug)]
pub struct QuotaWish {
    /// 0 asks whether anything is left.
    pub tokens: Tokens,
    /// `None`: only the limit of all models counts.
    pub model: Option<ModelName>,
}

impl QuotaWish {
    fn look<'a>(&'a self, user: UserId, limits: &'a TierLimits, tokens: Tokens) -> Wish<'a> {
        Wish {
            user_id: user,
            limits,
            model: self.model.as_ref(),
            request: RequestKey(0),
            tokens: tokens.max(1),
            mode: Mode::LookOnly,
            lasts: Duration::ZERO,
            is_request: false,
        }
    }
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
        let mut held = self.store.leased(user_id, period).await?;
        // What this replica has ready is nobody's yet.
        for (model, tokens) in &mut held {
            let meter = MeterName {
                user_id,
                period,
                model: model.clone(),
            };
            let ready = self.keeper.standing(&meter).map_or(0, |here| here.ready());
            *tokens = (*tokens - ready).max(0);
        }
        Ok(QuotaStanding::new(facts, held, &tiers))
    }

    /// Says whether a user may use more tokens now, of what this replica may hand out. Consumes
    /// nothing. The quota is that of all models; `None`: the tier's policy said so, while the database
    /// is away.
    ///
    /// # Errors
    /// `AccountDisabled` · `Unavailable`
    pub async fn check_quota(
        &self,
        user: &UserStanding,
        wish: &QuotaWish,
    ) -> Result<(Decision, Option<QuotaState>)> {
        let tiers = self.tiers();
        let limits = tiers.limits_of(&user.tier);
        if !user.is_active {
            return Err(Error::AccountDisabled);
        }
        let is_too_large = limits.exceeded_by(wish.tokens).is_some();
        // Of a request that is too large it is said all the same how the user stands.
        let tokens = if is_too_large { 1 } else { wish.tokens };
        let wish = wish.look(user.id, limits, tokens);
        let (decision, quota) = match self.keeper.reserve(&wish).await {
            Reservation::Enough(total) => (Decision::Allowed, stands(user, total)),
            Reservation::Denied(meters) => {
                let decision = match meters.iter().any(|(meter, _)| meter.model.is_none()) {
                    true => Decision::MonthlyLimit,
                    false => Decision::ModelLimit,
                };
                (decision, self.total_beside(meters, user))
            }
            Reservation::Held(_) | Reservation::RateLimited(_) | Reservation::Refused(_) => {
                let silence = "the database does not say what is left";
                return Err(Error::Unavailable(silence.into()));
            }
        };
        let decision = match is_too_large {
            true => Decision::RequestTooLarge,
            false => decision,
        };
        Ok((decision, quota))
    }

    /// [`Usage::check_quota`], if memory says yes; `None`: it may say so yet. `now` was lately.
    pub fn check_quota_at_once(
        &self,
        user: &UserStanding,
        wish: &QuotaWish,
        now: Boot,
    ) -> Option<(Decision, Option<QuotaState>)> {
        let tiers = self.tiers.load();
        let limits = tiers.limits_of(&user.tier);
        may_ask(user, limits, wish.tokens).ok()?;
        let look = wish.look(user.id, limits, wish.tokens);
        match self.keeper.reserve_at_once(&look, now)? {
            Reservation::Enough(total) => Some((Decision::Allowed, stands(user, total))),
            _ => None,
        }
    }

    /// [`Usage::check_quota`] for whom a no is an error, which names the limit that is short.
    ///
    /// # Errors
    /// `AccountDisabled` · `RequestTooLarge` · `QuotaExceeded` · `Unavailable`
    pub async fn require_quota(
        &self,
        user: &UserStanding,
        wish: &QuotaWish,
    ) -> Result<Option<QuotaState>> {
        let tiers = self.tiers();
        let limits = tiers.limits_of(&user.tier);
        may_ask(user, limits, wish.tokens)?;
        let look = wish.look(user.id, limits, wish.tokens);
        match self.keeper.reserve(&look).await {
            Reservation::Enough(total) => Ok(stands(user, total)),
            refused => Err(denial(user, limits, refused)),
        }
    }

    /// How the total stands of a user who is short on some meters.
    fn total_beside(
        &self,
        meters: Vec<(MeterName, Standing)>,
        user: &UserStanding,
    ) -> Option<QuotaState> {
        let (first, standing) = meters.into_iter().next()?;
        let standing = match first.model {
            None => standing,
            Some(_) => self.keeper.standing(&MeterName {
                model: None,
                ..first
            })?,
        };
        Some(standing.state(first.period, &user.tier))
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
        self.keeper.limits_changed(user_id);
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
        self.keeper.limits_changed(user_id);
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

    /// The grant that these credits were granted by before, as it stands now; `None`: they were not.
    ///
    /// # Errors
    /// `CreditConflict` when the request made another grant · `UserNotFound` · `Unavailable`
    pub async fn granted_credits(
        &self,
        new: &NewCredit,
        now: DateTime<Utc>,
    ) -> Result<Option<CreditGrant>> {
        self.store.credit_granted(new, &self.tiers(), now).await
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
        let voided = self.store.credit_void(id, reason, &tiers, origin).await?;
        self.keeper.limits_changed(voided.user_id);
        Ok(voided)
    }

    /// Writes down what has become of users' months by itself: a new month has begun, credits have expired
    /// or are used up, an override has expired, other tiers are in force. Returns of how many users. Nobody
    /// waits for it: only what is used from then on until it is done is judged by what comes after.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn settle(&self, now: DateTime<Utc>) -> Result<usize> {
        let tiers = self.tiers();
        let (mut settled, mut failed, mut after) = (0, None, None);
        loop {
            let users = self.store.quota_users(after, SETTLE_BATCH).await?;
            let Some(last) = users.last() else { break };
            after = Some(*last);
            let unsettled = self.store.quota_unsettled(&users, &tiers, now).await;
            // What is wrong with one user's rows keeps none of the others waiting.
            for user_id in unsettled.unwrap_or(users) {
                match self.store.quota_settle(user_id, &tiers).await {
                    Ok(()) => settled += 1,
                    Err(Error::UserNotFound) => {}
                    Err(error @ Error::Unavailable(_)) => return Err(error),
                    Err(error) => failed = Some(error),
                }
            }
        }
        failed.map_or(Ok(settled), Err)
    }
}

/// How a user stands who was found to have enough.
pub(super) fn stands(user: &UserStanding, total: Option<(Period, Standing)>) -> Option<QuotaState> {
    total.map(|(period, standing)| standing.state(period, &user.tier))
}
