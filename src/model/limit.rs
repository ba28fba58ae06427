//! What a user's monthly limit is, and where it comes from. Pure: a transaction that hands tokens out
//! decides with it from what it has read.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::{CreditId, ModelName, Period, TierName, Tiers, UserId};

/// How an unlimited base is recorded. No other base is as large.
const UNLIMITED: i64 = i64::MAX;

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
    /// Every credit that is not closed, and those closed since the oldest of these was granted.
    pub credits: Vec<Credit>,
    /// The months before this one since the oldest credit that is not closed, oldest first. Months
    /// without use and record may be left out.
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
    pub closed: Option<ClosedCredit>,
}

/// From when on a credit gives nothing more, and what had been drawn by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClosedCredit {
    pub at: DateTime<Utc>,
    pub drawn_tokens: i64,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditShare {
    pub credit: Credit,
    /// Drawn up to now, in all months.
    pub drawn: i64,
    /// Of this, in this month.
    pub drawn_this_month: i64,
    /// What it still gives; 0 once it is closed or has expired.
    pub remaining: i64,
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
            Some(over) if over.expires_at.is_none_or(|at| at > self.now) => {
                (over.monthly_tokens, BaseSource::Override)
            }
            _ => (limits.monthly_tokens, BaseSource::Tier),
        };
        let configured = configured.unwrap_or(UNLIMITED);
        // Under a larger limit, what was used up to it was in order.
        let kept = self.recorded_base.map_or(0, |base| base.min(self.used));
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

    /// Draws the credits, month by month. A month whose base nobody recorded has that of the month
    /// before it, or today's.
    fn draw(&self, configured: i64, base: i64) -> Vec<CreditShare> {
        let mut shares: Vec<CreditShare> = self
            .credits
            .iter()
            .map(|credit| CreditShare {
                credit: *credit,
                drawn: 0,
                drawn_this_month: 0,
                remaining: 0,
            })
            .collect();
        shares.sort_by_key(|share| share.credit.order());
        let mut known_base = configured;
        for month in &self.past {
            known_base = month.base.unwrap_or(known_base);
            let beyond = month.used.saturating_sub(known_base).max(0);
            draw_month(&mut shares, month.period, beyond);
        }
        let before: Vec<i64> = shares.iter().map(|share| share.drawn).collect();
        let beyond = self.used.saturating_sub(base).max(0);
        draw_month(&mut shares, self.period, beyond);
        for (share, before) in shares.iter_mut().zip(before) {
            share.drawn_this_month = share.drawn - before;
            if share.credit.gives(self.period, self.now) {
                share.remaining = share.credit.tokens - share.drawn;
            }
        }
        shares
    }
}

/// Draws what a month used beyond its base from the credits that are good in it.
fn draw_month(shares: &mut [CreditShare], period: Period, mut beyond: i64) {
    let closed_in = |share: &CreditShare| share.credit.closed_in(period);
    // What was drawn from one when it was closed is settled: it comes before the others, whatever
    // was granted since.
    for settled in [true, false] {
        for share in shares.iter_mut() {
            if closed_in(share).is_some() != settled || !share.credit.counts_in(period) {
                continue;
            }
            let most = closed_in(share).map_or(share.credit.tokens, |closed| closed.drawn_tokens);
            let drawn = beyond.min(most - share.drawn).max(0);
            share.drawn += drawn;
            beyond -= drawn;
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
        self.granted_at < period.end()
            && self.expires_at.is_none_or(|at| at > period.start())
            && self.closed.is_none_or(|closed| closed.at > period.start())
    }

    fn closed_in(&self, period: Period) -> Option<ClosedCredit> {
        self.closed.filter(|closed| closed.at < period.end())
    }

    fn gives(&self, period: Period, now: DateTime<Utc>) -> bool {
        self.closed.is_none() && !self.has_expired(now) && self.counts_in(period)
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

    /// The credits that have expired and are to be closed, with what was drawn from each; in the
    /// transaction that read the facts. Until then what goes beyond the base still draws from them.
    pub fn closing(&self, now: DateTime<Utc>) -> impl Iterator<Item = (CreditId, i64)> {
        let expired = self
            .credits
            .iter()
            .filter(move |share| share.credit.closed.is_none() && share.credit.has_expired(now));
        expired.map(|share| (share.credit.id, share.drawn))
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
            closed: None,
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
        let past = |of: &str, used, base| PastMonth {
            period: month(of),
            used,
            base,
        };
        facts.past = vec![
            past("2026-08", 130, Some(120)),
            // Nobody recorded another.
            past("2026-09", 140, None),
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
        let closing: Vec<_> = limit.closing(facts.now).collect();
        assert_eq!(closing, [(expired.id, 30)]);
        // Closed, it does not pay for what is used since.
        facts.credits[0].closed = Some(ClosedCredit {
            at: facts.now,
            drawn_tokens: 30,
        });
        assert_eq!(facts.limit(&tiers(Some(100))).tokens, Some(140));
        facts.used = 138;
        let limit = facts.limit(&tiers(Some(100)));
        assert_eq!((limit.tokens, remaining(&limit)), (Some(140), vec![0, 2]));
        assert_eq!(limit.closing(facts.now).count(), 0);
    }

    #[test]
    fn nothing_overflows() {
        let mut facts = facts(i64::MAX);
        facts.credits = vec![credit(i64::MAX, 0, day("2026-10", 1)); 3];
        facts.past = vec![PastMonth {
            period: month("2026-10"),
            used: i64::MAX,
            base: Some(0),
        }];
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
            let credits: i64 = remaining(&limit).iter().sum();
            let left = (own - facts.used).max(0) + credits;
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
        fn deciding_again_after_recording_changes_nothing(
            mut facts in any_facts(), base in 0_i64..1500,
        ) {
            let limit = facts.limit(&tiers(Some(base)));
            facts.recorded_base = Some(limit.base_to_record());
            let closing: BTreeMap<_, _> = limit.closing(facts.now).collect();
            for credit in &mut facts.credits {
                if let Some(drawn_tokens) = closing.get(&credit.id) {
                    credit.closed = Some(ClosedCredit { at: facts.now, drawn_tokens: *drawn_tokens });
                }
            }
            let again = facts.limit(&tiers(Some(base)));
            prop_assert_eq!((again.tokens, again.base), (limit.tokens, limit.base));
            prop_assert_eq!(remaining(&again), remaining(&limit));
        }

        #[test]
        fn voiding_a_credit_takes_just_what_it_had_left(
            facts in any_facts(), base in 0_i64..1500,
        ) {
            let limit = facts.limit(&tiers(Some(base)));
            for share in limit.credits.iter().filter(|share| share.credit.closed.is_none()) {
                let id = share.credit.id;
                let mut voided = facts.clone();
                let credits = voided.credits.iter_mut().filter(|credit| credit.id == id);
                credits.for_each(|credit| credit.closed = Some(ClosedCredit {
                    at: facts.now,
                    drawn_tokens: share.drawn,
                }));
                let after = voided.limit(&tiers(Some(base)));
                prop_assert_eq!(after.tokens, limit.tokens.map(|tokens| tokens - share.remaining));
                for other in limit.credits.iter().filter(|other| other.credit.id != id) {
                    let left = after.share(other.credit.id).map(|share| share.remaining);
                    prop_assert_eq!(left, Some(other.remaining));
                }
            }
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
