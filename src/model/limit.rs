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
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;
    use crate::model::{OnOutage, TierLimits};

    fn tiers(monthly_tokens: Option<i64>) -> Tiers {
        Tiers {
            all: vec![TierLimits {
                name: "free".parse().expect("valid"),
                monthly_tokens,
                models: BTreeMap::new(),
                requests_per_minute: None,
                max_request_tokens: None,
                on_outage: OnOutage::Closed,
                thresholds: Vec::new(),
            }],
            default: 0,
        }
    }

    fn month(text: &str) -> Period {
        text.parse().expect("valid")
    }

    /// A user in November, on the 11th.
    fn facts(used: i64) -> LimitFacts {
        let period = month("2026-11");
        LimitFacts {
            user_id: UserId::new(),
            period,
            now: day("2026-11", 11),
            tier: "free".parse().expect("valid"),
            override_: None,
            recorded_base: None,
            used,
            used_by_model: BTreeMap::new(),
            credits: Vec::new(),
            draws: Vec::new(),
            past: Vec::new(),
        }
    }

    fn day(of: &str, day: i64) -> DateTime<Utc> {
        month(of).start() + TimeDelta::days(day - 1)
    }

    fn credit(tokens: i64, priority: i32, granted_at: DateTime<Utc>) -> Credit {
        Credit {
            id: CreditId::new(),
            tokens,
            priority,
            granted_at,
            expires_at: None,
            first_month: Period::containing(granted_at),
            drawn_tokens: 0,
        }
    }

    fn past(of: &str, used: i64, base: Option<i64>) -> PastMonth {
        PastMonth {
            period: month(of),
            used,
            base,
        }
    }

    fn remaining(limit: &EffectiveLimit) -> Vec<i64> {
        limit.credits.iter().map(|share| share.remaining).collect()
    }

    #[test]
    fn the_tier_is_the_limit_unless_an_override_is_live() {
        let tiers = tiers(Some(100));
        let mut facts = facts(0);
        assert_eq!(facts.limit(&tiers).tokens, Some(100));
        for (monthly_tokens, expires_at, tokens, source) in [
            (Some(7), None, Some(7), BaseSource::Override),
            (None, None, None, BaseSource::Override),
            (
                Some(7),
                Some(day("2026-11", 12)),
                Some(7),
                BaseSource::Override,
            ),
            (Some(7), Some(facts.now), Some(100), BaseSource::Tier),
        ] {
            facts.override_ = Some(MonthlyOverride {
                monthly_tokens,
                expires_at,
            });
            let limit = facts.limit(&tiers);
            assert_eq!((limit.tokens, limit.base_source), (tokens, source));
        }
    }

    #[test]
    fn a_tier_that_is_gone_has_the_limits_of_the_default_one() {
        let mut facts = facts(0);
        facts.tier = "gone".parse().expect("valid");
        assert_eq!(facts.limit(&tiers(Some(100))).tokens, Some(100));
    }

    #[test]
    fn what_was_used_under_a_larger_limit_stays_paid_for() {
        let mut facts = facts(800);
        facts.recorded_base = Some(1000);
        facts.credits = vec![credit(50, 0, day("2026-11", 1))];
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!((limit.tokens, limit.base), (Some(850), Some(800)));
        assert_eq!(limit.base_source, BaseSource::Kept);
        // As it was recorded, and with more used since.
        facts.recorded_base = Some(limit.base_to_record());
        facts.used = 820;
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!((limit.tokens, remaining(&limit)), (Some(850), vec![30]));
        // Unlimited before.
        facts.recorded_base = Some(UNLIMITED);
        assert_eq!(facts.limit(&tiers(Some(100))).base, Some(820));
        // An upgrade holds at once.
        assert_eq!(facts.limit(&tiers(Some(900))).base, Some(900));
    }

    #[test]
    fn low_priorities_are_drawn_first_then_what_expires_soonest() {
        let granted = day("2026-11", 2);
        let expiring = |days| Credit {
            expires_at: Some(day("2026-11", days)),
            ..credit(10, 5, granted)
        };
        let (last, first) = (credit(10, 6, granted), credit(10, -1, granted));
        let (later, sooner) = (expiring(25), expiring(20));
        let mut facts = facts(125);
        facts.credits = vec![last, later, credit(10, 5, granted), sooner, first];
        let limit = facts.limit(&tiers(Some(100)));
        let ids: Vec<_> = limit.credits.iter().map(|share| share.credit.id).collect();
        assert_eq!(ids[..3], [first.id, sooner.id, later.id]);
        assert_eq!(ids[4], last.id);
        assert_eq!(remaining(&limit), [0, 0, 5, 10, 10]);
        assert_eq!(limit.tokens, Some(150));
    }

    #[test]
    fn past_months_have_drawn_by_their_own_bases() {
        let mut facts = facts(0);
        facts.credits = vec![credit(100, 0, day("2026-08", 15))];
        facts.past = vec![
            past("2026-08", 130, Some(120)),
            // Nobody recorded one: today's.
            past("2026-09", 1020, None),
            past("2026-10", 215, Some(200)),
        ];
        let limit = facts.limit(&tiers(Some(1000)));
        assert_eq!(remaining(&limit), [100 - 10 - 20 - 15]);
        assert_eq!(limit.tokens, Some(1055));
        // A month before the grant draws nothing.
        facts.past.insert(0, past("2026-07", 500, Some(0)));
        assert_eq!(facts.limit(&tiers(Some(1000))), limit);
    }

    #[test]
    fn an_expired_credit_gives_no_more_and_keeps_what_it_gave() {
        let mut facts = facts(130);
        let expired = Credit {
            expires_at: Some(day("2026-11", 10)),
            ..credit(50, 0, day("2026-11", 1))
        };
        facts.credits = vec![expired, credit(10, 1, day("2026-11", 1))];
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!(remaining(&limit), [0, 10]);
        assert_eq!(limit.tokens, Some(140));
        let closing: Vec<_> = limit
            .closing()
            .map(|one| (one.credit.id, one.drawn))
            .collect();
        assert_eq!(closing, [(expired.id, 30)]);
        // Closed, it does not pay for what is used since.
        let mut facts = facts.settled(&limit);
        assert_eq!(facts.limit(&tiers(Some(100))).tokens, Some(140));
        facts.used = 138;
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!((limit.tokens, remaining(&limit)), (Some(140), vec![0, 2]));
        assert_eq!(limit.closing().count(), 0);
    }

    #[test]
    fn what_is_used_after_a_smaller_limit_was_recorded_draws_credits() {
        let (large, small) = (tiers(Some(1000)), tiers(Some(100)));
        let mut facts = facts(800);
        facts.credits = vec![credit(50, 0, day("2026-11", 1))];
        facts = facts.settled(&facts.limit(&large));
        facts = facts.settled(&facts.limit(&small));
        let before = facts.limit(&small);
        assert_eq!((before.base, before.tokens), (Some(800), Some(850)));
        facts.used = 830;
        let after = facts.limit(&small);
        assert_eq!((after.base, after.tokens), (Some(800), Some(850)));
        assert_eq!(remaining(&after), [20]);
    }

    #[test]
    fn a_month_that_is_over_keeps_its_base_and_gets_no_more_of_credits() {
        let mut facts = LimitFacts {
            now: day("2026-12", 1),
            recorded_base: Some(100),
            ..facts(120)
        };
        facts.credits = vec![credit(50, 0, day("2026-11", 1))];
        for today in [0, 100, 1000] {
            let limit = facts.limit(&tiers(Some(today)));
            assert_eq!((limit.base, limit.tokens), (Some(100), Some(120)));
            assert_eq!(
                limit.closing().count(),
                0,
                "December may have drawn as well"
            );
        }
    }

    #[test]
    fn late_use_of_a_month_draws_no_more_from_a_closed_credit() {
        let mut facts = facts(0);
        let (first, second) = (
            credit(100, 0, day("2026-10", 5)),
            credit(100, 1, day("2026-10", 6)),
        );
        facts.credits = vec![first, second];
        facts.past = vec![past("2026-10", 130, Some(100))];
        let limit = facts.limit(&tiers(Some(100)));
        facts.close(limit.share(first.id).expect("open"));
        // More is booked for October.
        facts.past[0].used = 145;
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!(limit.share(first.id), None);
        assert_eq!((limit.tokens, remaining(&limit)), (Some(185), vec![85]));
    }

    #[test]
    fn a_closed_credit_gives_to_a_month_what_that_month_drew_and_no_more() {
        let mut facts = facts(110);
        let first = credit(100, 0, day("2026-10", 5));
        facts.credits = vec![first, credit(100, 1, day("2026-11", 2))];
        facts.past = vec![past("2026-10", 160, Some(100))];
        let limit = facts.limit(&tiers(Some(100)));
        facts.close(limit.share(first.id).expect("open"));
        // As they are read when all open credits are of November.
        facts.past.clear();
        facts.draws.retain(|draw| draw.period == facts.period);
        let before = facts.limit(&tiers(Some(100)));
        assert_eq!(
            (before.tokens, remaining(&before)),
            (Some(210), vec![0, 100])
        );
        let closed = before.share(first.id).expect("gave this month");
        assert_eq!((closed.drawn, closed.drawn_this_month), (70, 10));
        facts.used = 160;
        let after = facts.limit(&tiers(Some(100)));
        assert_eq!(
            (after.tokens, remaining(&after)),
            (before.tokens, vec![0, 50])
        );
    }

    #[test]
    fn a_credit_that_is_used_up_is_closed_and_stays_given() {
        let mut facts = facts(150);
        facts.credits = vec![credit(50, 0, day("2026-11", 1))];
        let limit = facts.limit(&tiers(Some(100)));
        let mut facts = facts.settled(&limit);
        assert_eq!(facts.credits, []);
        assert_eq!(facts.limit(&tiers(Some(100))).tokens, limit.tokens);
        // It has paid: a larger limit is there in full, a smaller one does not pay a second time.
        assert_eq!(facts.limit(&tiers(Some(1000))).tokens, Some(1050));
        facts = facts.settled(&facts.limit(&tiers(Some(1000))));
        assert_eq!(facts.limit(&tiers(Some(0))).tokens, Some(150));
    }

    #[test]
    fn months_that_take_no_more_events_are_settled() {
        let mut facts = facts(0);
        facts.credits = vec![credit(100, 0, day("2026-07", 1))];
        facts.past = vec![
            past("2026-07", 110, Some(100)),
            past("2026-08", 120, Some(100)),
            past("2026-09", 105, Some(100)),
        ];
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!(remaining(&limit), [65]);
        let mut settled = facts.settled(&limit);
        let credit = settled.credits[0];
        assert_eq!(
            (credit.first_month, credit.drawn_tokens),
            (month("2026-09"), 30)
        );
        assert_eq!(remaining(&settled.limit(&tiers(Some(100)))), [65]);
        // They are not read any more.
        settled.past.drain(..2);
        assert_eq!(remaining(&settled.limit(&tiers(Some(100)))), [65]);
        assert_eq!(settled.settled(&settled.limit(&tiers(Some(100)))), settled);
    }

    #[test]
    fn nothing_overflows() {
        let mut facts = facts(i64::MAX);
        facts.credits = vec![credit(i64::MAX, 0, day("2026-10", 1)); 3];
        facts.past = vec![past("2026-10", i64::MAX, Some(0))];
        assert_eq!(
            facts.limit(&tiers(Some(i64::MAX - 1))).tokens,
            Some(i64::MAX)
        );
        facts.used = 0;
        assert_eq!(facts.limit(&tiers(Some(1))).tokens, Some(i64::MAX));
        facts.recorded_base = Some(UNLIMITED);
        facts.used = i64::MIN;
        assert!(facts.limit(&tiers(Some(1))).tokens.is_some());
    }

    /// Credits granted since July, some expired or to expire, and what the months used.
    fn any_facts() -> impl Strategy<Value = LimitFacts> {
        let granted = 0_i64..120;
        let lives = proptest::option::of(1_i64..200);
        let credits = proptest::collection::vec((1_i64..1000, 0..3_i32, granted, lives), 0..6);
        let past = proptest::collection::vec((0_i64..2000, proptest::option::of(0_i64..1500)), 4);
        let recorded = proptest::option::of(0_i64..3000);
        (credits, past, recorded, 0_i64..3000).prop_map(|(credits, past, recorded, used)| {
            let first = month("2026-07");
            let at = |days| first.start() + TimeDelta::days(days);
            let months = past.into_iter().zip(0..);
            let past = months.map(|((used, base), n)| PastMonth {
                period: first.plus_months(n),
                used,
                base,
            });
            let credits = credits
                .into_iter()
                .map(|(tokens, priority, granted, lives)| Credit {
                    expires_at: lives.map(|days| at(granted + days)),
                    ..credit(tokens, priority, at(granted))
                });
            LimitFacts {
                credits: credits.collect(),
                past: past.collect(),
                recorded_base: recorded,
                ..facts(used)
            }
        })
    }

    proptest! {
        #[test]
        fn what_is_left_is_what_the_base_and_the_credits_have_left(
            facts in any_facts(), base in 0_i64..1500,
        ) {
            let limit = facts.limit(&tiers(Some(base)));
            let tokens = limit.tokens.expect("limited");
            let own = limit.base.expect("limited");
            let given = facts.given(facts.period);
            let credits: i64 = remaining(&limit).iter().sum();
            let left = (own + given - facts.used).max(0) + credits;
            if facts.used <= tokens {
                prop_assert_eq!(tokens - facts.used, left);
            } else {
                // An overrun: nothing is left anywhere.
                prop_assert_eq!(left, 0);
            }
            for share in &limit.credits {
                prop_assert!(share.drawn_this_month >= 0 && share.remaining >= 0);
                prop_assert!(share.drawn_this_month <= share.drawn);
                prop_assert!(share.drawn + share.remaining <= share.credit.tokens);
            }
        }

        #[test]
        fn using_tokens_moves_no_limit_while_no_credit_expires(
            mut facts in any_facts(), base in 0_i64..1500, more in 0_i64..3000,
        ) {
            facts.recorded_base = None;
            facts.credits.retain(|credit| !credit.has_expired(facts.now));
            let before = facts.limit(&tiers(Some(base))).tokens;
            facts.used += more;
            prop_assert_eq!(facts.limit(&tiers(Some(base))).tokens, before);
        }

        #[test]
        fn settling_changes_nothing_and_settling_again_has_nothing_to_do(
            facts in any_facts(), base in 0_i64..1500,
        ) {
            let limit = facts.limit(&tiers(Some(base)));
            let settled = facts.settled(&limit);
            let again = settled.limit(&tiers(Some(base)));
            prop_assert_eq!((again.tokens, again.base), (limit.tokens, limit.base));
            for share in &limit.credits {
                let same = again.share(share.credit.id).map(|one| (one.drawn_this_month, one.remaining));
                prop_assert_eq!(same.unwrap_or((0, 0)), (share.drawn_this_month, share.remaining));
            }
            prop_assert_eq!(settled.settled(&again), settled);
        }

        #[test]
        fn voiding_a_credit_takes_just_what_it_had_left(
            facts in any_facts(), base in 0_i64..1500,
        ) {
            let limit = facts.limit(&tiers(Some(base)));
            for share in &limit.credits {
                let id = share.credit.id;
                let mut voided = facts.clone();
                voided.close(share);
                let after = voided.limit(&tiers(Some(base)));
                prop_assert_eq!(after.tokens, limit.tokens.map(|tokens| tokens - share.remaining));
                for other in limit.credits.iter().filter(|other| other.credit.id != id) {
                    let left = after.share(other.credit.id).map(|share| share.remaining);
                    prop_assert_eq!(left, Some(other.remaining));
                }
            }
        }

        #[test]
        fn late_use_draws_only_from_credits_that_are_open(
            mut facts in any_facts(), base in 0_i64..1500, late in 1_i64..500, month in 0_usize..4,
        ) {
            let limit = facts.limit(&tiers(Some(base)));
            let (voided, open): (Vec<_>, Vec<_>) = limit.credits.iter().enumerate()
                .partition(|(index, _)| index % 2 == 0);
            for (_, share) in voided {
                facts.close(share);
            }
            let before = facts.limit(&tiers(Some(base)));
            facts.past[month].used += late;
            let after = facts.limit(&tiers(Some(base)));
            let lost = |share: &CreditShare| share.remaining
                - after.share(share.credit.id).map_or(0, |share| share.remaining);
            let lost: i64 = open.iter().map(|(_, share)| lost(share)).sum();
            prop_assert!((0..=late).contains(&lost));
            prop_assert_eq!(before.tokens.zip(after.tokens).map(|(a, b)| a - b >= 0), Some(true));
        }

        #[test]
        fn a_credit_more_never_lowers_the_limit(
            mut facts in any_facts(), base in 0_i64..1500, tokens in 1_i64..1000, priority in -1..4,
        ) {
            let before = facts.limit(&tiers(Some(base))).tokens.expect("limited");
            facts.credits.push(credit(tokens, priority, facts.now));
            let after = facts.limit(&tiers(Some(base))).tokens.expect("limited");
            prop_assert!((before..=before + tokens).contains(&after), "{} {}", before, after);
        }
    }
}
