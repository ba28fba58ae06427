use super::{Period, TierName};

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
    /// Tokens in one request.
    pub max_request_tokens: Option<i64>,
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
