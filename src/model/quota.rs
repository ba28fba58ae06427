use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::{
    CreditId, EffectiveLimit, GrantRequestId, LimitFacts, ModelName, Period, TierName, UserId,
    Violation,
};

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

    /// Reads the name of a configured tier.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn named(&self, text: &str) -> Result<TierName, Violation> {
        let name = text.parse()?;
        match self.get(&name) {
            Some(tier) => Ok(tier.name.clone()),
            None => Err("must be a configured tier, see UsageService.ListTiers".into()),
        }
    }

    /// As [`Tiers::named`]; an empty text names the default tier.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn named_or_default(&self, text: &str) -> Result<TierName, Violation> {
        match text {
            "" => Ok(self.default_tier().name.clone()),
            text => self.named(text),
        }
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

    /// The most that one request may use, when `tokens` are more.
    pub fn exceeded_by(&self, tokens: i64) -> Option<i64> {
        self.max_request_tokens.filter(|max| tokens > *max)
    }
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

/// How a user stands in a month: what may be used, what was, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaStanding {
    pub facts: LimitFacts,
    pub limit: EffectiveLimit,
    /// What servers hold or have ready, of each model and, `None`, of all.
    pub held: BTreeMap<Option<ModelName>, i64>,
    pub max_request_tokens: Option<i64>,
    pub requests_per_minute: Option<i64>,
}

impl QuotaStanding {
    /// As people are told of it.
    pub fn state(&self) -> QuotaState {
        let remaining = self.remaining_tokens();
        QuotaState {
            period: self.facts.period,
            tier: self.facts.tier.clone(),
            limit: self.limit.tokens,
            used: self.facts.used,
            // More may be leased than a limit that was lowered leaves.
            held: self.held_of(None).min(remaining.unwrap_or(i64::MAX)),
            remaining,
        }
    }

    pub fn new(facts: LimitFacts, held: BTreeMap<Option<ModelName>, i64>, tiers: &Tiers) -> Self {
        let limits = tiers.limits_of(&facts.tier);
        Self {
            limit: facts.limit(tiers),
            held,
            max_request_tokens: limits.max_request_tokens,
            requests_per_minute: limits.requests_per_minute,
            facts,
        }
    }

    /// What is left, never below zero; `None` means unlimited.
    pub fn remaining_tokens(&self) -> Option<i64> {
        left(self.limit.tokens, self.facts.used)
    }

    /// What is left by the model's own limit, whatever all models together leave; `None` when it has
    /// none.
    pub fn remaining_of_model(&self, model: &ModelName) -> Option<i64> {
        left(
            self.limit.models.get(model).copied(),
            self.used_of_model(model),
        )
    }

    /// What servers hold or have ready of a model; `None`: of all together.
    pub fn held_of(&self, model: Option<&ModelName>) -> i64 {
        self.held.get(&model.cloned()).copied().unwrap_or(0)
    }

    /// What was used of a model that has a limit.
    pub fn used_of_model(&self, model: &ModelName) -> i64 {
        self.facts.used_by_model.get(model).copied().unwrap_or(0)
    }
}

/// How a month's limit of all models, or of one, stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaState {
    pub period: Period,
    pub tier: TierName,
    /// `None`: unlimited.
    pub limit: Option<i64>,
    pub used: i64,
    /// Of what remains, held by reservations or kept ready for them by other replicas.
    pub held: i64,
    /// Not used yet, never below zero; `None`: unlimited.
    pub remaining: Option<i64>,
}

/// Fewer tokens are left than wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaExceeded {
    pub user_id: UserId,
    /// The one that is short; `None`: all together.
    pub model: Option<ModelName>,
    pub quota: QuotaState,
}

impl QuotaExceeded {
    /// The model that is short, to follow the word tokens.
    pub fn of_model(&self) -> String {
        let of = |model| format!(" of {model}");
        self.model.as_ref().map(of).unwrap_or_default()
    }
}

fn left(limit: Option<i64>, used: i64) -> Option<i64> {
    limit.map(|limit| limit.saturating_sub(used).max(0))
}

/// Credits to grant.
#[derive(Clone, Debug)]
pub struct NewCredit {
    pub user_id: UserId,
    /// 1 to [`TierLimits::MAX_TOKENS`].
    pub tokens: i64,
    pub priority: i32,
    pub expires_at: Option<DateTime<Utc>>,
    pub reason: String,
    /// Chosen by the caller: the same one again is the same grant.
    pub request_id: GrantRequestId,
}

/// Credits as granted, and what is left of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreditGrant {
    pub id: CreditId,
    pub user_id: UserId,
    pub tokens: i64,
    pub priority: i32,
    pub granted_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    pub voided_at: Option<DateTime<Utc>>,
    pub remaining: i64,
    pub reason: String,
    pub request_id: GrantRequestId,
}
