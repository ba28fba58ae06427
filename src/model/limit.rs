//! What a user's monthly limit is, and where it comes from. Pure: a transaction that hands tokens out
//! decides with it from what it has read.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::{CreditId, ModelName, Period, TierName, Tiers, UserId};

/// How an unlimited base is recorded. No other base is as large.
const UNLIMITED: i64 = i64::MAX;

/// Months before the current one that usage may still be booked for: events are taken for 35 days.
const OPEN_MONTHS: u32 = 2;

/// What the limit of a user's month follows from, as one snapshot of the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitFacts {
    pub user_id: UserId,
    pub period: Period,
    /// By the clock of the database.
    pub now: DateTime<Utc>,
    pub tier: TierName,
    pub override_: Option<MonthlyOverride>,
    /// The base of this month as it was last recorded, by [`EffectiveLimit::base_to_record`].
    pub recorded_base: Option<i64>,
    /// Tokens committed this month.
    pub used: i64,
    /// Of these, by model; at least the models that any tier limits.
    pub used_by_model: BTreeMap<ModelName, i64>,
    /// Every credit that is not closed.
    pub credits: Vec<Credit>,
    /// What closed credits gave to this month and to those of `past`.
    pub draws: Vec<Draw>,
    /// The months before this one from the first on in which a credit that is not closed may have been
    /// drawn. Months without use and record may be left out.
    pub past: Vec<PastMonth>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PastMonth {
    pub period: Period,
    pub used: i64,
    /// As last recorded in it.
    pub base: Option<i64>,
}

/// Takes the place of the tier's monthly tokens, until it expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonthlyOverride {
    /// `None`: unlimited.
    pub monthly_tokens: Option<i64>,
    pub expires_at: Option<DateTime<Utc>>,
}

impl MonthlyOverride {
    pub fn has_expired(&self, now: DateTime<Utc>) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// Tokens granted to a user beyond the monthly limit. Drawn, once, by what months use beyond their
/// base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    pub id: CreditId,
    pub tokens: i64,
    /// Low ones are drawn first, then those that expire soonest.
    pub priority: i32,
    pub granted_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    /// The first month that it counts in and that is not settled: the one of its grant, or a later one.
    pub first_month: Period,
    /// By the months before `first_month`; once it is closed, by all.
    pub drawn_tokens: i64,
}

/// What a month drew from a credit that is closed: neither more nor less, whatever is booked for that
/// month since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    pub credit: Credit,
    pub period: Period,
    pub tokens: i64,
}

/// A month's limit and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffectiveLimit {
    /// What may be used in the month in all; `None`: anything.
    pub tokens: Option<i64>,
    /// Of this, what is no credit.
    pub base: Option<i64>,
    pub base_source: BaseSource,
    /// In the order in which they are drawn.
    pub credits: Vec<CreditShare>,
    /// Limits of single models beside that, by the tier. Neither overrides nor credits change them.
    pub models: BTreeMap<ModelName, i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseSource {
    Tier,
    Override,
    /// The limit was larger earlier in the month: what was used under it stays paid for, and draws
    /// no credit.
    Kept,
}

/// What a credit gives and gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreditShare {
    pub credit: Credit,
    /// Drawn up to now, in all months.
    pub drawn: i64,
    /// Of this, in this month.
    pub drawn_this_month: i64,
    /// What it still gives; 0 once it is closed or has expired.
    pub remaining: i64,
    /// What months that are not settled drew, in their order.
    draws: Vec<(Period, i64)>,
    /// It has expired or is used up, and is to be closed.
    is_over: bool,
}

impl CreditShare {
    /// What is to be written down when it is closed: what each month drew that is not settled.
    pub fn draws(&self) -> impl Iterator<Item = (Period, i64)> {
        self.draws.iter().copied()
    }
}

impl LimitFacts {
    /// The limit of the month.
    ///
    /// Credits are drawn by what a month uses beyond its base, in order; nothing is stored of that, so
    /// late events and changed bases find their way. A credit counts in the months it is good in: it
    /// is not known when within a month tokens were used. So what a credit has given is fixed when it
    /// is closed, see [`EffectiveLimit::closing`].
    pub fn limit(&self, tiers: &Tiers) -> EffectiveLimit {
        let limits = tiers.limits_of(&self.tier);
        let (configured, source) = match self.override_ {
            Some(over) if !over.has_expired(self.now) => {
                (over.monthly_tokens, BaseSource::Override)
            }
            _ => (limits.monthly_tokens, BaseSource::Tier),
        };
        let configured = match self.recorded_base {
            // What changed since is no matter of that month.
            Some(base) if self.now >= self.period.end() => base,
            _ => configured.unwrap_or(UNLIMITED),
        };
        // Under a larger limit, what was used up to it was in order.
        let paid = self.used.saturating_sub(self.given(self.period));
        let kept = self.recorded_base.map_or(0, |base| base.min(paid));
        let base = configured.max(kept);
        let base_source = if kept > configured {
            BaseSource::Kept
        } else {
            source
        };
        let credits = self.draw(configured, base);
        let tokens = (base != UNLIMITED).then(|| {
            credits.iter().fold(base, |sum, share| {
                sum.saturating_add(share.drawn_this_month)
                    .saturating_add(share.remaining)
            })
        });
        EffectiveLimit {
            tokens,
            base: (base != UNLIMITED).then_some(base),
            base_source,
            credits,
            models: limits.models.clone(),
        }
    }

    /// These facts as they are once everything that was decided has been written down: the base is
    /// recorded, credits that give nothing more are closed, months that take no more events are settled,
    /// and an override that has expired is gone. Whoever has nothing to write down gets the same.
    #[must_use]
    pub fn settled(&self, limit: &EffectiveLimit) -> Self {
        let mut settled = self.clone();
        settled.recorded_base = Some(limit.base_to_record());
        for share in limit.closing() {
            settled.close(share);
        }
        if let Some(first) = self.first_open_month() {
            for (id, drawn) in limit.settling(first) {
                let credits = settled.credits.iter_mut().filter(|credit| credit.id == id);
                credits.for_each(|credit| {
                    credit.first_month = first;
                    credit.drawn_tokens = drawn;
                });
            }
        }
        settled.override_ = self.override_.filter(|over| !over.has_expired(self.now));
        settled
    }

    /// Closes a credit: what it gave stays, and it gives nothing more.
    pub fn close(&mut self, share: &CreditShare) {
        self.credits.retain(|credit| credit.id != share.credit.id);
        let credit = Credit {
            drawn_tokens: share.drawn,
            ..share.credit
        };
        self.draws
            .extend(share.draws().map(|(period, tokens)| Draw {
                credit,
                period,
                tokens,
            }));
    }

    /// The first month that usage may still be booked for; `None` when these are facts of a month that
    /// is not the current one, which nothing is settled by.
    pub fn first_open_month(&self) -> Option<Period> {
        let is_current = Period::containing(self.now) == self.period;
        is_current.then(|| self.period.minus_months(OPEN_MONTHS))
    }

    /// What closed credits gave to a month.
    fn given(&self, period: Period) -> i64 {
        let draws = self.draws.iter().filter(|draw| draw.period == period);
        draws.fold(0, |sum, draw| sum.saturating_add(draw.tokens))
    }

    /// Draws the credits, month by month. A month whose base nobody recorded has today's.
    fn draw(&self, configured: i64, base: i64) -> Vec<CreditShare> {
        let shares = self.credits.iter().map(|credit| CreditShare {
            credit: *credit,
            drawn: credit.drawn_tokens,
            drawn_this_month: 0,
            remaining: 0,
            draws: Vec::new(),
            is_over: false,
        });
        let mut shares = Vec::from_iter(shares);
        shares.sort_by_key(|share| share.credit.order());
        for month in &self.past {
            let base = month.base.unwrap_or(configured);
            self.draw_month(&mut shares, month.period, month.used, base);
        }
        self.draw_month(&mut shares, self.period, self.used, base);
        for share in &mut shares {
            let this_month = share.draws().filter(|(period, _)| *period == self.period);
            share.drawn_this_month = this_month.map(|(_, tokens)| tokens).sum();
            let left = share.credit.tokens - share.drawn;
            let has_expired = share.credit.has_expired(self.now);
            // A month that is over gets no more: the next one decides about it already.
            if !has_expired && share.credit.counts_in(self.period) && self.now < self.period.end() {
                share.remaining = left;
            }
            share.is_over = self.first_open_month().is_some() && (has_expired || left == 0);
        }
        let given = self.draws.iter().filter(|draw| draw.period == self.period);
        shares.extend(given.map(|draw| CreditShare {
            credit: draw.credit,
            drawn: draw.credit.drawn_tokens,
            drawn_this_month: draw.tokens,
            remaining: 0,
            draws: Vec::new(),
            is_over: false,
        }));
        shares.sort_by_key(|share| share.credit.order());
        shares
    }

    /// Draws what a month used beyond its base, and beyond what closed credits gave to it, from the
    /// credits that are good in it.
    fn draw_month(&self, shares: &mut [CreditShare], period: Period, used: i64, base: i64) {
        let paid = base.saturating_add(self.given(period));
        let mut beyond = used.saturating_sub(paid).max(0);
        for share in shares.iter_mut() {
            let drawn = beyond.min(share.credit.tokens - share.drawn);
            if drawn > 0 && share.credit.counts_in(period) {
                share.drawn += drawn;
                share.draws.push((period, drawn));
                beyond -= drawn;
            }
        }
    }
}

impl Credit {
    fn order(&self) -> impl Ord + use<> {
        (
            self.priority,
            self.expires_at.unwrap_or(DateTime::<Utc>::MAX_UTC),
            self.granted_at,
            self.id,
        )
    }

    /// Whether use in the month may draw from it.
    fn counts_in(&self, period: Period) -> bool {
        self.first_month <= period && self.expires_at.is_none_or(|at| at > period.start())
    }

    fn has_expired(&self, now: DateTime<Utc>) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

impl EffectiveLimit {
    /// What is to be recorded of the month, in the transaction that read the facts.
    pub fn base_to_record(&self) -> i64 {
        self.base.unwrap_or(UNLIMITED)
    }

    /// The credits that have expired or are used up, and are to be closed in the transaction that read
    /// the facts. Until then what goes beyond the base still draws from those that have expired.
    pub fn closing(&self) -> impl Iterator<Item = &CreditShare> {
        self.credits.iter().filter(|share| share.is_over)
    }

    /// What the months before `first` drew, of the other credits that such months may draw from.
    pub fn settling(&self, first: Period) -> impl Iterator<Item = (CreditId, i64)> {
        let open = self.credits.iter().filter(move |share| {
            !share.is_over && share.remaining > 0 && share.credit.first_month < first
        });
        open.map(move |share| {
            let before = share.draws().filter(|(period, _)| *period < first);
            let drawn: i64 = before.map(|(_, tokens)| tokens).sum();
            (share.credit.id, share.credit.drawn_tokens + drawn)
        })
    }

    /// What a credit gives and gave; `None` when it is not among the facts.
    pub fn share(&self, id: CreditId) -> Option<&CreditShare> {
        self.credits.iter().find(|share| share.credit.id == id)
    }
}

#[cfg(test)]
#[path = "limit_tests.rs"]
mod tests;
