use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};

use super::{LimitFacts, Period, Tiers, UserId};

/// A user has used as much of a month's limit as a threshold of the tier says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaNotice {
    pub user_id: UserId,
    pub period: Period,
    /// Percent of the limit.
    pub threshold: u8,
    /// Tokens committed in the month.
    pub used: i64,
    /// What they were compared with: the tier's tokens or the user's own, and credits.
    pub limit: i64,
    /// When that was found, by the clock of the database.
    pub found_at: DateTime<Utc>,
}

impl QuotaNotice {
    /// The kind of its event.
    pub const KIND: &str = "quota.threshold_reached";

    /// Every threshold that is reached, whether or not it was noticed before. Of what is unlimited, or
    /// nothing, there is no part to be told.
    pub fn due(facts: &LimitFacts, tiers: &Tiers) -> Vec<Self> {
        let Some(limit @ 1..) = facts.limit(tiers).tokens else {
            return Vec::new();
        };
        let is_reached = |threshold: u8| {
            i128::from(facts.used) * 100 >= i128::from(limit) * i128::from(threshold)
        };
        let thresholds = tiers.limits_of(&facts.tier).thresholds.iter();
        thresholds
            .filter(|threshold| is_reached(**threshold))
            .map(|threshold| Self {
                user_id: facts.user_id,
                period: facts.period,
                threshold: *threshold,
                used: facts.used,
                limit,
                found_at: facts.now,
            })
            .collect()
    }

    /// The event as others read it.
    pub fn payload(&self) -> Value {
        json!({
            "type": Self::KIND,
            "timestamp": self.found_at.to_rfc3339_opts(SecondsFormat::Millis, true),
            "data": {
                "user_id": self.user_id.to_string(),
                "month": self.period.to_string(),
                "model": null,
                "threshold_percent": self.threshold,
                "used_tokens": self.used,
                "limit_tokens": self.limit,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::{Credit, CreditId, MonthlyOverride, OnOutage, TierLimits};

    fn tiers(monthly_tokens: Option<i64>, thresholds: &[u8]) -> Tiers {
        let tier = TierLimits {
            name: "free".parse().expect("valid"),
            monthly_tokens,
            models: BTreeMap::new(),
            requests_per_minute: None,
            max_request_tokens: None,
            on_outage: OnOutage::Closed,
            thresholds: thresholds.to_vec(),
        };
        Tiers {
            all: vec![tier],
            default: 0,
        }
    }

    fn facts(used: i64) -> LimitFacts {
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("valid");
        LimitFacts {
            user_id: UserId::new(),
            period: Period::containing(now),
            now,
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

    fn reached(facts: &LimitFacts, tiers: &Tiers) -> Vec<u8> {
        let due = QuotaNotice::due(facts, tiers);
        due.iter().map(|notice| notice.threshold).collect()
    }

    #[test]
    fn a_threshold_is_reached_at_its_last_token_and_not_before() {
        let tiers = tiers(Some(999), &[1, 80, 100]);
        for (used, expected) in [
            (0, &[][..]),
            (9, &[]),
            (10, &[1]),
            (799, &[1]),
            (800, &[1, 80]),
            (998, &[1, 80]),
            (999, &[1, 80, 100]),
            (i64::MAX, &[1, 80, 100]),
        ] {
            assert_eq!(reached(&facts(used), &tiers), expected, "{used}");
        }
    }

    #[test]
    fn nothing_is_told_of_no_limit_of_zero_and_without_thresholds() {
        for tiers in [
            tiers(None, &[80, 100]),
            tiers(Some(0), &[80, 100]),
            tiers(Some(10), &[]),
        ] {
            assert_eq!(reached(&facts(1000), &tiers), &[0; 0]);
        }
    }

    #[test]
    fn the_largest_numbers_are_compared_as_they_are() {
        let most = TierLimits::MAX_TOKENS;
        let tiers = tiers(Some(most), &[100]);
        assert_eq!(reached(&facts(most - 1), &tiers), &[0; 0]);
        assert_eq!(reached(&facts(most), &tiers), [100]);
    }

    #[test]
    fn overrides_and_credits_count() {
        let tiers = tiers(Some(100), &[80, 100]);
        let mut facts = facts(100);
        facts.credits.push(Credit {
            id: CreditId::new(),
            tokens: 25,
            priority: 0,
            granted_at: facts.now,
            expires_at: None,
            first_month: facts.period,
            drawn_tokens: 0,
        });
        assert_eq!(reached(&facts, &tiers), [80]);
        facts.override_ = Some(MonthlyOverride {
            monthly_tokens: Some(1000),
            expires_at: None,
        });
        assert_eq!(reached(&facts, &tiers), &[0; 0]);
        facts.override_ = Some(MonthlyOverride {
            monthly_tokens: None,
            expires_at: None,
        });
        assert_eq!(reached(&facts, &tiers), &[0; 0]);
    }

    #[test]
    fn the_event_says_who_when_and_how_much() {
        let tiers = tiers(Some(100), &[80]);
        let facts = facts(85);
        let due = QuotaNotice::due(&facts, &tiers);
        let expected = json!({
            "type": "quota.threshold_reached",
            "timestamp": "2027-01-15T08:00:00.000Z",
            "data": {
                "user_id": facts.user_id.to_string(),
                "month": "2027-01",
                "model": null,
                "threshold_percent": 80,
                "used_tokens": 85,
                "limit_tokens": 100,
            },
        });
        assert_eq!(due[0].payload(), expected);
    }
}
