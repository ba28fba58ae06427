//! What limits follow from: read in one statement, so that it fits together.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Jsonb, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::{Store, errors::stored, prepared::prepared};
use crate::{
    error::{Error, Result},
    model::{
        Credit, CreditId, Draw, LimitFacts, ModelName, MonthlyOverride, PastMonth, Period, Tiers,
        UserId,
    },
};

impl Store {
    /// What a user's limit of a month follows from.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn quota_facts(
        &self,
        user_id: UserId,
        period: Period,
        tiers: &Tiers,
    ) -> Result<LimitFacts> {
        let mut conn = self.conn().await?;
        let facts = quota_facts_in_txn(&[user_id], period, tiers, &mut conn).await?;
        facts.into_iter().next().ok_or(Error::UserNotFound)
    }

    /// As [`Store::quota_facts`] of many; users who do not exist are left out.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn quota_facts_of(
        &self,
        users: &[UserId],
        period: Period,
        tiers: &Tiers,
    ) -> Result<Vec<LimitFacts>> {
        let mut conn = self.conn().await?;
        quota_facts_in_txn(users, period, tiers, &mut conn).await
    }
}

/// What the limits of users in a month follow from; users who do not exist are left out.
///
/// To hand tokens out by it, lock the users' rows of `quota_balances` first, in a statement before
/// this one: else this would see what was before whoever held the lock.
pub(super) async fn quota_facts_in_txn(
    users: &[UserId],
    period: Period,
    tiers: &Tiers,
    conn: &mut AsyncPgConnection,
) -> Result<Vec<LimitFacts>> {
    let mut models: Vec<String> = tiers
        .all
        .iter()
        .flat_map(|tier| tier.models.keys().map(ModelName::to_string))
        .collect();
    models.sort_unstable();
    models.dedup();
    let query = FactsQuery {
        users: users.iter().map(|id| id.0).collect(),
        month: period.to_string(),
        models,
    };
    let rows: Vec<(Uuid, String, i64, Value)> = query.load(conn).await?;
    rows.into_iter()
        .map(|(id, tier, now, found)| {
            let found: Found = serde_json::from_value(found).map_err(Error::internal)?;
            found.facts(UserId(id), period, instant(now)?, &tier)
        })
        .collect()
}

/// Prepared once. Times are microseconds since 1970: JSON knows no times.
struct FactsQuery {
    users: Vec<Uuid>,
    month: String,
    /// Whose use is asked for, beside that of all together.
    models: Vec<String>,
}

/// What no bigint can hold is as much as the largest: more than any limit.
const TOTAL: &str = "least(m.input_tokens::numeric + m.output_tokens + m.cached_input_tokens \
     + m.cache_write_tokens + m.reasoning_tokens, 9223372036854775807)::bigint";

/// The first month that a credit may be drawn in still: that of its grant, or a later one.
macro_rules! first_month {
    () => {
        "greatest(to_char(c.granted_at AT TIME ZONE 'UTC', 'YYYY-MM') COLLATE \"C\", c.settled_before)"
    };
}
const FIRST_MONTH: &str = first_month!();

/// What [`FoundCredit`] reads.
const CREDIT: &str = concat!(
    "'id', c.id, 'tokens', c.tokens, 'priority', c.priority,
    'granted_at', (extract(epoch FROM c.granted_at) * 1000000)::bigint,
    'expires_at', (extract(epoch FROM c.expires_at) * 1000000)::bigint,
    'drawn_tokens', c.drawn_tokens, 'first_month', ",
    first_month!()
);

impl QueryFragment<Pg> for FactsQuery {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT u.id, u.tier, (extract(epoch FROM statement_timestamp()) * 1000000)::bigint,
                jsonb_build_object(
                'over', (SELECT jsonb_build_object('monthly_tokens', o.monthly_tokens,
                        'expires_at', (extract(epoch FROM o.expires_at) * 1000000)::bigint)
                    FROM quota_overrides AS o WHERE o.user_id = u.id),
                'credits', (SELECT jsonb_agg(jsonb_build_object(",
        );
        out.push_sql(CREDIT);
        out.push_sql(
            "))
                    FROM credit_grants AS c WHERE c.user_id = u.id AND c.closed_at IS NULL),
                'draws', (SELECT jsonb_agg(jsonb_build_object('month', d.month, 'given', d.tokens, ",
        );
        out.push_sql(CREDIT);
        out.push_sql(
            "))
                    FROM credit_draws AS d JOIN credit_grants AS c ON c.id = d.credit_id
                    WHERE d.user_id = u.id AND d.month BETWEEN since.month AND ",
        );
        out.push_bind_param::<Text, _>(&self.month)?;
        out.push_sql(
            "),
                'used', (SELECT jsonb_object_agg(m.month, ",
        );
        out.push_sql(TOTAL);
        out.push_sql(
            ") FROM monthly_usage AS m
                    WHERE m.user_id = u.id AND m.month BETWEEN since.month AND ",
        );
        out.push_bind_param::<Text, _>(&self.month)?;
        out.push_sql(
            "),
                'bases', (SELECT jsonb_object_agg(b.month, b.base_limit) FROM quota_balances AS b
                    WHERE b.user_id = u.id AND b.model = '' AND b.base_limit IS NOT NULL
                        AND b.month BETWEEN since.month AND ",
        );
        out.push_bind_param::<Text, _>(&self.month)?;
        out.push_sql("), 'models', (SELECT jsonb_object_agg(m.model, ");
        out.push_sql(TOTAL);
        out.push_sql(
            ") FROM monthly_model_usage AS m
                    WHERE m.user_id = u.id AND m.month = ",
        );
        out.push_bind_param::<Text, _>(&self.month)?;
        out.push_sql(" AND m.model = ANY(");
        out.push_bind_param::<Array<Text>, _>(&self.models)?;
        // From the first month on that a credit may be drawn in still.
        out.push_sql(
            ")))
            FROM users AS u
            CROSS JOIN LATERAL (SELECT LEAST(min(",
        );
        out.push_sql(FIRST_MONTH);
        out.push_sql("), ");
        out.push_bind_param::<Text, _>(&self.month)?;
        out.push_sql(
            ") COLLATE \"C\" AS month
                FROM credit_grants AS c WHERE c.user_id = u.id AND c.closed_at IS NULL) AS since
            WHERE u.id = ANY(",
        );
        out.push_bind_param::<Array<SqlUuid>, _>(&self.users)?;
        out.push_sql(")");
        Ok(())
    }
}

prepared! {
    FactsQuery => (SqlUuid, Text, BigInt, Jsonb) = Self;
}

/// What the statement puts together; null where there is nothing.
#[derive(Deserialize)]
struct Found {
    over: Option<FoundOverride>,
    credits: Option<Vec<FoundCredit>>,
    draws: Option<Vec<FoundDraw>>,
    used: Option<BTreeMap<String, i64>>,
    bases: Option<BTreeMap<String, i64>>,
    models: Option<BTreeMap<String, i64>>,
}

#[derive(Deserialize)]
struct FoundOverride {
    monthly_tokens: Option<i64>,
    expires_at: Option<i64>,
}

#[derive(Deserialize)]
struct FoundCredit {
    id: Uuid,
    tokens: i64,
    priority: i32,
    granted_at: i64,
    expires_at: Option<i64>,
    drawn_tokens: i64,
    first_month: String,
}

#[derive(Deserialize)]
struct FoundDraw {
    month: String,
    given: i64,
    #[serde(flatten)]
    credit: FoundCredit,
}

impl Found {
    fn facts(
        self,
        user_id: UserId,
        period: Period,
        now: DateTime<Utc>,
        tier: &str,
    ) -> Result<LimitFacts> {
        let override_ = match self.over {
            Some(over) => Some(MonthlyOverride {
                monthly_tokens: over.monthly_tokens,
                expires_at: over.expires_at.map(instant).transpose()?,
            }),
            None => None,
        };
        let mut months: BTreeMap<Period, PastMonth> = BTreeMap::new();
        let (used, bases) = (
            self.used.unwrap_or_default(),
            self.bases.unwrap_or_default(),
        );
        for (month, used) in used {
            let period: Period = stored("monthly_usage.month", &month)?;
            entry(&mut months, period).used = used;
        }
        for (month, base) in bases {
            let period: Period = stored("quota_balances.month", &month)?;
            entry(&mut months, period).base = Some(base);
        }
        let current = months.remove(&period);
        let models = self.models.unwrap_or_default().into_iter();
        let credits = self.credits.unwrap_or_default().into_iter();
        let draws = self.draws.unwrap_or_default().into_iter();
        Ok(LimitFacts {
            user_id,
            period,
            now,
            tier: stored("users.tier", tier)?,
            override_,
            recorded_base: current.and_then(|month| month.base),
            used: current.map_or(0, |month| month.used),
            used_by_model: models
                .map(|(model, used)| Ok((stored("monthly_model_usage.model", &model)?, used)))
                .collect::<Result<_>>()?,
            credits: credits.map(FoundCredit::credit).collect::<Result<_>>()?,
            draws: draws.map(FoundDraw::draw).collect::<Result<_>>()?,
            past: months.into_values().collect(),
        })
    }
}

fn entry(months: &mut BTreeMap<Period, PastMonth>, period: Period) -> &mut PastMonth {
    months.entry(period).or_insert(PastMonth {
        period,
        used: 0,
        base: None,
    })
}

impl FoundCredit {
    fn credit(self) -> Result<Credit> {
        Ok(Credit {
            id: CreditId(self.id),
            tokens: self.tokens,
            priority: self.priority,
            granted_at: instant(self.granted_at)?,
            expires_at: self.expires_at.map(instant).transpose()?,
            first_month: stored("credit_grants.settled_before", &self.first_month)?,
            drawn_tokens: self.drawn_tokens,
        })
    }
}

impl FoundDraw {
    fn draw(self) -> Result<Draw> {
        Ok(Draw {
            period: stored("credit_draws.month", &self.month)?,
            tokens: self.given,
            credit: self.credit.credit()?,
        })
    }
}

fn instant(micros: i64) -> Result<DateTime<Utc>> {
    DateTime::from_timestamp_micros(micros)
        .ok_or_else(|| Error::internal("a time beyond all times"))
}
