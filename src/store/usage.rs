//! Reading the ledger: events, and the sums that enforcement reads.

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{exists, select},
    pg::Pg,
    prelude::*,
    query_builder::AstPass,
    sql_types::Uuid as SqlUuid,
};
use diesel_async::RunQueryDsl;
use serde_json::Value;
use uuid::Uuid;

use super::{
    Store,
    errors::stored,
    schema::{monthly_model_usage, usage_records},
};
use crate::{
    error::{Error, Result},
    model::{
        EventId, Labels, ModelUsage, MonthlyUsage, Page, PageRequest, Period, TokenCounts,
        UsageCursor, UsageEvent, UsageFilter, UsageRecord, UsageTotals, UserId,
    },
};

impl Store {
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
            .select((monthly_model_usage::model, SumsRow::as_select()))
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

    /// Whether there are sums of any month.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_any_month(&self, user_id: UserId) -> Result<bool> {
        let mut conn = self.conn().await?;
        let months = monthly_model_usage::table.filter(monthly_model_usage::user_id.eq(user_id.0));
        let any = select(exists(months.select(monthly_model_usage::month)));
        Ok(any.get_result(&mut conn).await?)
    }

    /// A user's events that `filter` leaves, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_list(
        &self,
        user_id: UserId,
        filter: &UsageFilter,
        page: &PageRequest<UsageCursor>,
    ) -> Result<Page<UsageRecord>> {
        let mut query = usage_records::table
            .filter(usage_bucket(usage_records::user_id).eq(usage_bucket(user_id.0)))
            .filter(usage_records::user_id.eq(user_id.0))
            .select(UsageRow::as_select())
            .order((
                usage_records::occurred_at.desc(),
                usage_records::event_id.desc(),
            ))
            .limit(page.size + 1)
            .into_boxed();
        if filter.is_timed() {
            let range = filter.range();
            let months = (range.first_month(), range.last_month());
            query = query
                .filter(usage_records::occurred_at.ge(range.start))
                .filter(usage_records::occurred_at.lt(range.end))
                // Follows from the times; leaves the partitions of other months alone.
                .filter(usage_records::usage_month.ge(months.0.to_string()))
                .filter(usage_records::usage_month.le(months.1.to_string()));
        }
        if let Some(model) = &filter.model {
            query = query.filter(usage_records::model.eq(model.as_str()));
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
        // All records of a user may be looked through for a model, and all of others in the bucket for a user's.
        let mut conn = self.bulk_conn().await?;
        let rows: Vec<UsageRow> = query.load(&mut conn).await?;
        conn.done();
        let records = rows
            .into_iter()
            .map(UsageRecord::try_from)
            .collect::<Result<Vec<_>>>()?;
        let cursor = |record: &UsageRecord| UsageCursor {
            occurred_at: record.event.occurred_at,
            event_id: record.event.event_id,
        };
        let bytes = |record: &UsageRecord| record.event.bytes();
        Ok(Page::from_large_rows(records, page, cursor, bytes))
    }
}

diesel::define_sql_function! {
    /// Where the index of events has a user's. Whoever reads a user's events says both: the bucket finds
    /// the place, the user leaves them.
    fn usage_bucket(user_id: SqlUuid) -> Integer;
}

/// Leaves events of a user, see [`usage_bucket()`].
pub(super) fn push_events_of<'b>(
    user_id: &'b Uuid,
    out: &mut AstPass<'_, 'b, Pg>,
) -> QueryResult<()> {
    out.push_sql(" AND usage_bucket(user_id) = usage_bucket(");
    out.push_bind_param::<SqlUuid, _>(user_id)?;
    out.push_sql(") AND user_id = ");
    out.push_bind_param::<SqlUuid, _>(user_id)
}

/// The five dimensions and the count of requests.
#[derive(Queryable, Selectable)]
#[diesel(table_name = monthly_model_usage)]
pub(super) struct SumsRow {
    #[diesel(column_name = input_tokens)]
    input: i64,
    #[diesel(column_name = output_tokens)]
    output: i64,
    #[diesel(column_name = cached_input_tokens)]
    cached_input: i64,
    #[diesel(column_name = cache_write_tokens)]
    cache_write: i64,
    #[diesel(column_name = reasoning_tokens)]
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
pub(super) struct UsageRow {
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
