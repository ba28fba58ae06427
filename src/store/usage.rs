//! The ledger's tables: events, and the sums that enforcement reads.

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Jsonb, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::Value;
use uuid::Uuid;

use super::{
    Store,
    errors::stored,
    schema::{monthly_model_usage, monthly_usage, usage_records},
};
use crate::{
    error::{Error, Result},
    model::{
        EventId, Labels, ModelUsage, MonthlyUsage, Page, PageRequest, Period, TokenCounts,
        UsageCursor, UsageEvent, UsageRecord, UsageTotals, UserId,
    },
};

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageInsert {
    /// Booked, and added to the sums.
    Recorded,
    /// Booked before with the same payload; counted once.
    Duplicate,
    /// Booked before with another payload; nothing was done.
    Conflict,
}

impl Store {
    /// Books an event and adds it to its month's sums, or finds that it was booked before.
    ///
    /// Durable when it returns. Any number of calls with one event count once.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_insert(&self, event: &UsageEvent) -> Result<UsageInsert> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let new: Vec<(String, Uuid, Uuid)> = InsertEvents::new(std::slice::from_ref(event))
                .load(conn)
                .await?;
            if !new.is_empty() {
                return Ok(UsageInsert::Recorded);
            }
            // A statement of its own: its snapshot sees what the insert stumbled over.
            let booked = usage_by_key_in_txn(event, conn).await?;
            let same = booked.is_some_and(|booked| booked.event == *event);
            Ok(if same {
                UsageInsert::Duplicate
            } else {
                UsageInsert::Conflict
            })
        })
        .await
    }

    /// Tokens a user has used in a month, all dimensions together.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_month_tokens(&self, user_id: UserId, period: Period) -> Result<i64> {
        let mut conn = self.conn().await?;
        let row: Option<SumsRow> = monthly_usage::table
            .find((user_id.0, period.to_string()))
            .select((
                monthly_usage::input_tokens,
                monthly_usage::output_tokens,
                monthly_usage::cached_input_tokens,
                monthly_usage::cache_write_tokens,
                monthly_usage::reasoning_tokens,
                monthly_usage::request_count,
            ))
            .first(&mut conn)
            .await
            .optional()?;
        Ok(row.map_or(0, |row| UsageTotals::from(row).tokens.total()))
    }

    /// A user's month, per model and in all; zeroes when nothing was used.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_month(&self, user_id: UserId, period: Period) -> Result<MonthlyUsage> {
        let mut conn = self.conn().await?;
        // One statement, one snapshot: the total is the sum of the models it is shown with.
        let rows: Vec<(String, SumsRow)> = monthly_model_usage::table
            .filter(monthly_model_usage::user_id.eq(user_id.0))
            .filter(monthly_model_usage::month.eq(period.to_string()))
            .order(monthly_model_usage::model)
            .select((
                monthly_model_usage::model,
                (
                    monthly_model_usage::input_tokens,
                    monthly_model_usage::output_tokens,
                    monthly_model_usage::cached_input_tokens,
                    monthly_model_usage::cache_write_tokens,
                    monthly_model_usage::reasoning_tokens,
                    monthly_model_usage::request_count,
                ),
            ))
            .load(&mut conn)
            .await?;
        let models = rows
            .into_iter()
            .map(|(model, sums)| {
                Ok(ModelUsage {
                    model: stored("monthly_model_usage.model", &model)?,
                    totals: sums.into(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let totals = models.iter().map(|model| model.totals).sum();
        Ok(MonthlyUsage {
            user_id,
            period,
            totals,
            models,
        })
    }

    /// A user's events, newest first; of one month or of all.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_list(
        &self,
        user_id: UserId,
        period: Option<Period>,
        page: &PageRequest<UsageCursor>,
    ) -> Result<Page<UsageRecord>> {
        let mut query = usage_records::table
            .filter(usage_records::user_id.eq(user_id.0))
            .select(UsageRow::as_select())
            .order((
                usage_records::occurred_at.desc(),
                usage_records::event_id.desc(),
            ))
            .limit(page.size + 1)
            .into_boxed();
        if let Some(period) = period {
            query = query.filter(usage_records::usage_month.eq(period.to_string()));
        }
        if let Some(after) = page.after {
            query = query.filter(
                usage_records::occurred_at
                    .lt(after.occurred_at)
                    .or(usage_records::occurred_at
                        .eq(after.occurred_at)
                        .and(usage_records::event_id.lt(after.event_id.0))),
            );
            // Implied by the line above; said so that the index is entered at the right place.
            query = query.filter(usage_records::occurred_at.le(after.occurred_at));
        }
        let mut conn = self.conn().await?;
        let rows: Vec<UsageRow> = query.load(&mut conn).await?;
        let records = rows
            .into_iter()
            .map(UsageRecord::try_from)
            .collect::<Result<Vec<_>>>()?;
        Ok(Page::from_rows(records, page, |record| UsageCursor {
            occurred_at: record.event.occurred_at,
            event_id: record.event.event_id,
        }))
    }
}

async fn usage_by_key_in_txn(
    event: &UsageEvent,
    conn: &mut AsyncPgConnection,
) -> Result<Option<UsageRecord>> {
    let row: Option<UsageRow> = usage_records::table
        .find((
            event.period().to_string(),
            event.user_id.0,
            event.event_id.0,
        ))
        .select(UsageRow::as_select())
        .first(conn)
        .await
        .optional()?;
    row.map(TryInto::try_into).transpose()
}

/// Inserts events that are not there yet and adds just those to both sums; returns their keys.
///
/// A fragment of its own with a static id: diesel would prepare an upsert anew on every call. Keys
/// are upserted in sorted order, so that concurrent batches never wait for each other in a circle.
struct InsertEvents {
    months: Vec<String>,
    user_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
    occurred_at: Vec<DateTime<Utc>>,
    models: Vec<String>,
    input: Vec<i64>,
    output: Vec<i64>,
    cached_input: Vec<i64>,
    cache_write: Vec<i64>,
    reasoning: Vec<i64>,
    request_ids: Vec<String>,
    labels: Vec<Value>,
}

impl InsertEvents {
    fn new(events: &[UsageEvent]) -> Self {
        let column = |value: fn(&UsageEvent) -> i64| events.iter().map(value).collect();
        Self {
            months: events
                .iter()
                .map(|event| event.period().to_string())
                .collect(),
            user_ids: events.iter().map(|event| event.user_id.0).collect(),
            event_ids: events.iter().map(|event| event.event_id.0).collect(),
            occurred_at: events.iter().map(|event| event.occurred_at).collect(),
            models: events.iter().map(|event| event.model.to_string()).collect(),
            input: column(|event| event.tokens.input),
            output: column(|event| event.tokens.output),
            cached_input: column(|event| event.tokens.cached_input),
            cache_write: column(|event| event.tokens.cache_write),
            reasoning: column(|event| event.tokens.reasoning),
            request_ids: events
                .iter()
                .map(|event| event.request_id.clone())
                .collect(),
            labels: events
                .iter()
                .map(|event| {
                    event
                        .labels
                        .iter()
                        .map(|(key, value)| (key.clone(), value.as_str().into()))
                        .collect()
                })
                .map(Value::Object)
                .collect(),
        }
    }
}

impl QueryFragment<Pg> for InsertEvents {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "WITH new AS (
                INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_id, labels)
                SELECT * FROM unnest(",
        );
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        for ids in [&self.user_ids, &self.event_ids] {
            out.push_sql(", ");
            out.push_bind_param::<Array<SqlUuid>, _>(ids)?;
        }
        out.push_sql(", ");
        out.push_bind_param::<Array<Timestamptz>, _>(&self.occurred_at)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<Text>, _>(&self.models)?;
        for counts in [
            &self.input,
            &self.output,
            &self.cached_input,
            &self.cache_write,
            &self.reasoning,
        ] {
            out.push_sql(", ");
            out.push_bind_param::<Array<BigInt>, _>(counts)?;
        }
        out.push_sql(", ");
        out.push_bind_param::<Array<Text>, _>(&self.request_ids)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<Jsonb>, _>(&self.labels)?;
        out.push_sql(
            ")
                ON CONFLICT DO NOTHING
                RETURNING *
            ), by_model AS (
                INSERT INTO monthly_model_usage AS m (user_id, month, model,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_count)
                SELECT user_id, usage_month, model,
                    sum(input_tokens), sum(output_tokens), sum(cached_input_tokens),
                    sum(cache_write_tokens), sum(reasoning_tokens), count(*)
                FROM new GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
                ON CONFLICT (user_id, month, model) DO UPDATE SET
                    input_tokens = m.input_tokens + EXCLUDED.input_tokens,
                    output_tokens = m.output_tokens + EXCLUDED.output_tokens,
                    cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
                    cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
                    reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
                    request_count = m.request_count + EXCLUDED.request_count
            ), by_month AS (
                INSERT INTO monthly_usage AS m (user_id, month,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_count)
                SELECT user_id, usage_month,
                    sum(input_tokens), sum(output_tokens), sum(cached_input_tokens),
                    sum(cache_write_tokens), sum(reasoning_tokens), count(*)
                FROM new GROUP BY 1, 2 ORDER BY 1, 2
                ON CONFLICT (user_id, month) DO UPDATE SET
                    input_tokens = m.input_tokens + EXCLUDED.input_tokens,
                    output_tokens = m.output_tokens + EXCLUDED.output_tokens,
                    cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
                    cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
                    reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
                    request_count = m.request_count + EXCLUDED.request_count
            )
            SELECT usage_month, user_id, event_id FROM new",
        );
        Ok(())
    }
}

impl QueryId for InsertEvents {
    type QueryId = Self;
    const HAS_STATIC_QUERY_ID: bool = true;
}

impl Query for InsertEvents {
    type SqlType = (Text, SqlUuid, SqlUuid);
}

/// The five dimensions and the count of requests.
#[derive(Queryable)]
struct SumsRow {
    input: i64,
    output: i64,
    cached_input: i64,
    cache_write: i64,
    reasoning: i64,
    request_count: i64,
}

impl From<SumsRow> for UsageTotals {
    fn from(row: SumsRow) -> Self {
        let SumsRow {
            input,
            output,
            cached_input,
            cache_write,
            reasoning,
            request_count,
        } = row;
        let tokens = TokenCounts {
            input,
            output,
            cached_input,
            cache_write,
            reasoning,
        };
        Self {
            tokens,
            request_count,
        }
    }
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = usage_records, check_for_backend(Pg))]
struct UsageRow {
    user_id: Uuid,
    event_id: Uuid,
    occurred_at: DateTime<Utc>,
    model: String,
    input_tokens: i64,
    output_tokens: i64,
    cached_input_tokens: i64,
    cache_write_tokens: i64,
    reasoning_tokens: i64,
    request_id: String,
    labels: Value,
    recorded_at: DateTime<Utc>,
}

impl TryFrom<UsageRow> for UsageRecord {
    type Error = Error;

    fn try_from(row: UsageRow) -> Result<Self> {
        let labels: Labels = serde_json::from_value(row.labels).map_err(Error::internal)?;
        let event = UsageEvent {
            event_id: EventId(row.event_id),
            occurred_at: row.occurred_at,
            user_id: UserId(row.user_id),
            model: stored("usage_records.model", &row.model)?,
            tokens: TokenCounts {
                input: row.input_tokens,
                output: row.output_tokens,
                cached_input: row.cached_input_tokens,
                cache_write: row.cache_write_tokens,
                reasoning: row.reasoning_tokens,
            },
            request_id: row.request_id,
            labels,
        };
        Ok(Self {
            event,
            recorded_at: row.recorded_at,
        })
    }
}
