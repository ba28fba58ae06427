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
