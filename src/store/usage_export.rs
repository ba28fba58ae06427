//! Reading many events, batch by batch: no statement lasts long, and nothing is held in between.

use diesel::{
    dsl::sql,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use super::{
    Store,
    conn::Conn,
    ledger::UsageRowTypes,
    schema::monthly_model_usage,
    usage::{UsageRow, push_events_of},
};
use crate::{
    error::{Error, Result},
    model::{TimeRange, UsageCursor, UsageFilter, UsageRecord, UserId},
};

impl Store {
    /// The next events of an export, at most `limit`; none at its end.
    ///
    /// Of one user or of all, each user's newest first. `after` is the last event that was read. Perhaps
    /// fewer than `limit` although there are more: only none means the end.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_export_batch(
        &self,
        whose: Option<UserId>,
        filter: &UsageFilter,
        after: Option<(UserId, UsageCursor)>,
        limit: i64,
    ) -> Result<Vec<UsageRecord>> {
        let mut conn = self.bulk_conn().await?;
        let mut rows: Vec<UsageRow> = Vec::new();
        // The rest of a bucket, then those after it: in one condition Postgres could not go to the place
        // in its index.
        if let Some((user_id, cursor)) = after {
            let rest = ExportBatch::new(whose, Place::Within(user_id.0, cursor), filter, limit);
            rows = rest.load(&mut conn).await?;
        }
        if rows.is_empty() {
            let place = match (whose, after) {
                (Some(_), Some(_)) => {
                    conn.done();
                    return Ok(Vec::new());
                }
                (_, None) => Place::Start,
                (None, Some((user_id, _))) => Place::Behind(user_id.0),
            };
            rows = ExportBatch::new(whose, place, filter, limit)
                .load(&mut conn)
                .await?;
        }
        conn.done();
        rows.into_iter().map(UsageRecord::try_from).collect()
    }

    /// About how many events an export has: as many or fewer, unless records were dropped.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_export_size(
        &self,
        whose: Option<UserId>,
        filter: &UsageFilter,
    ) -> Result<i64> {
        let range = filter.range();
        let months = (
            range.first_month().to_string(),
            range.last_month().to_string(),
        );
        let mut query = monthly_model_usage::table
            .filter(monthly_model_usage::month.between(months.0, months.1))
            .select(sql::<Nullable<BigInt>>("sum(request_count)::bigint"))
            .into_boxed();
        if let Some(user_id) = whose {
            query = query.filter(monthly_model_usage::user_id.eq(user_id.0));
        }
        let mut conn = self.conn().await?;
        let size: Option<i64> = query.get_result(&mut conn).await?;
        Ok(size.unwrap_or_default())
    }

    /// Waits for a turn to read much.
    pub(super) async fn bulk_read(&self) -> Result<OwnedSemaphorePermit> {
        let turn = self.bulk_reads.clone().acquire_owned().await;
        turn.map_err(Error::internal)
    }

    /// As [`Store::bulk_read`], with a connection that is to be [`Conn::done`] with.
    pub(super) async fn bulk_conn(&self) -> Result<Conn> {
        let turn = self.bulk_read().await?;
        Ok(self.conn().await?.reading_much(turn))
    }
}

/// Which events come next: those of a user are all in one bucket, see [`push_events_of`].
#[derive(Clone, Copy, Debug)]
enum Place {
    Start,
    /// Those of this user's bucket that are behind this event of the user.
    Within(Uuid, UsageCursor),
    /// Those of buckets behind this user's.
    Behind(Uuid),
}

/// Reads events in the order of their index, from a place in it.
struct ExportBatch<'a> {
    whose: Option<UserId>,
    place: Place,
    range: TimeRange,
    first_month: String,
    last_month: String,
    model: Option<&'a str>,
    limit: i64,
}

impl<'a> ExportBatch<'a> {
    fn new(whose: Option<UserId>, place: Place, filter: &'a UsageFilter, limit: i64) -> Self {
        let range = filter.range();
        Self {
            whose,
            place,
            range,
            first_month: range.first_month().to_string(),
            last_month: range.last_month().to_string(),
            model: filter.model.as_ref().map(|model| model.as_str()),
            limit,
        }
    }
}

impl QueryFragment<Pg> for ExportBatch<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        // Planned for its values: for any, Postgres takes a range to hold little and would sort.
        out.unsafe_to_cache_prepared();
        out.push_sql(
            "SELECT user_id, event_id, occurred_at, model, input_tokens, output_tokens,
                 cached_input_tokens, cache_write_tokens, reasoning_tokens, request_id, labels,
                 recorded_at
             FROM usage_records WHERE usage_month BETWEEN ",
        );
        out.push_bind_param::<Text, _>(&self.first_month)?;
        out.push_sql(" AND ");
        out.push_bind_param::<Text, _>(&self.last_month)?;
        out.push_sql(" AND occurred_at >= ");
        out.push_bind_param::<Timestamptz, _>(&self.range.start)?;
        out.push_sql(" AND occurred_at < ");
        out.push_bind_param::<Timestamptz, _>(&self.range.end)?;
        if let Some(user_id) = &self.whose {
            push_events_of(&user_id.0, &mut out)?;
        }
        match &self.place {
            Place::Start => {}
            Place::Within(user_id, cursor) => {
                out.push_sql(" AND usage_bucket(user_id) = usage_bucket(");
                out.push_bind_param::<SqlUuid, _>(user_id)?;
                out.push_sql(") AND (occurred_at, event_id, user_id) < (");
                out.push_bind_param::<Timestamptz, _>(&cursor.occurred_at)?;
                out.push_sql(", ");
                out.push_bind_param::<SqlUuid, _>(&cursor.event_id.0)?;
                out.push_sql(", ");
                out.push_bind_param::<SqlUuid, _>(user_id)?;
                out.push_sql(")");
            }
            Place::Behind(user_id) => {
                out.push_sql(" AND usage_bucket(user_id) > usage_bucket(");
                out.push_bind_param::<SqlUuid, _>(user_id)?;
                out.push_sql(")");
            }
        }
        if let Some(model) = &self.model {
            out.push_sql(" AND model = ");
            out.push_bind_param::<Text, _>(model)?;
        }
        out.push_sql(
            " ORDER BY usage_bucket(user_id), occurred_at DESC, event_id DESC, user_id DESC LIMIT ",
        );
        out.push_bind_param::<BigInt, _>(&self.limit)?;
        Ok(())
    }
}

impl QueryId for ExportBatch<'_> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl Query for ExportBatch<'_> {
    type SqlType = UsageRowTypes;
}
