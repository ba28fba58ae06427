use std::collections::BTreeMap;

use super::{ModelName, Period, TierName};

/// The tiers users can be in, in the order configured. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiers {
    pub all: Vec<TierLimits>,
    /// Index of the tier of newly registered users.
    pub default: usize,
}

impl Tiers {
    pub fn get(&self, name: &TierName) -> Option<&TierLimits> {
        self.all.iter().find(|tier| tier.name == *name)
    }

    /// The limits of the users in a tier. Those whose tier is configured no longer have the default
    /// one's, so that a file with a mistake neither locks people out nor lifts their limits.
    pub fn limits_of(&self, name: &TierName) -> &TierLimits {
        self.get(name).unwrap_or_else(|| self.default_tier())
    }

    pub fn default_tier(&self) -> &TierLimits {
        &self.all[self.default]
    }
}

/// What a tier allows; `None` means unlimited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierLimits {
    pub name: TierName,
    /// Tokens per UTC calendar month.
    pub monthly_tokens: Option<i64>,
    /// Tokens of one model per UTC calendar month, beside those of all. Models that are not named
    /// have no limit of their own.
    pub models: BTreeMap<ModelName, i64>,
    pub requests_per_minute: Option<i64>,
    /// Tokens in one request.
    pub max_request_tokens: Option<i64>,
    pub on_outage: OnOutage,
    /// Percents of the month's limit at which a notice is due: ascending, 1 to 100 each.
    pub thresholds: Vec<u8>,
}

impl TierLimits {
    /// Most tokens that any limit may be. Many of them add up without overflow.
    pub const MAX_TOKENS: i64 = 1_000_000_000_000_000;
}

/// What is admitted while the database is away, once what a replica holds is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOutage {
    Closed,
    /// So many tokens more, for each user and replica.
    Open {
        open_tokens: i64,
    },
}

/// How much of a month is used and left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaStanding {
    pub period: Period,
    pub tier: TierName,
    pub limit_tokens: Option<i64>,
    pub used_tokens: i64,
}

impl QuotaStanding {
    /// What is left, never below zero; `None` means unlimited.
    pub fn remaining_tokens(&self) -> Option<i64> {
        self.limit_tokens
            .map(|limit| limit.saturating_sub(self.used_tokens).max(0))
    }
}
