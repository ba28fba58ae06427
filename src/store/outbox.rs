//! What others are to be told: written once, delivered at least once.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Integer, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use serde_json::Value;
use uuid::Uuid;

use super::Store;
use crate::{
    error::Result,
    model::{Period, QuotaNotice, UserId},
};

/// In order, so that replicas that notice the same do not wait for each other in a circle.
const NOTICE: &str = "
    WITH due AS (
        SELECT * FROM unnest($1, $2, $3, $4, $5) AS d (id, month, user_id, threshold, payload)
    ), new AS (
        INSERT INTO quota_notices (month, user_id, threshold)
        SELECT month, user_id, threshold FROM due ORDER BY 1, 2, 3
        ON CONFLICT DO NOTHING
        RETURNING month, user_id, threshold
    )
    INSERT INTO outbox (id, kind, payload)
    SELECT id, $6, payload FROM due JOIN new USING (month, user_id, threshold)";

/// Each user is looked up in one month; by the months, old ones would be read as well.
const USERS: &str = "
    SELECT id FROM users
    WHERE id > $2
        AND EXISTS (SELECT FROM monthly_model_usage WHERE user_id = users.id AND month = $1)
    ORDER BY id LIMIT $3";

/// Skips what others claim at this moment; what they have claimed is not due.
const CLAIM: &str = "
    UPDATE outbox SET attempts = attempts + 1, available_at = now() + $2 * interval '1 ms'
    WHERE id IN (
        SELECT id FROM outbox
        WHERE kind = $1 AND delivered_at IS NULL AND available_at <= now()
        ORDER BY available_at LIMIT $3
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id, payload, attempts, created_at";

/// Unless somebody else has claimed it since, or delivered it.
const FAILED: &str = "
    UPDATE outbox SET last_error = $3, available_at = now() + $4 * interval '1 ms'
    WHERE id = $1 AND attempts = $2 AND delivered_at IS NULL";

/// Beyond so many it is not counted how many more there are.
const MOST_PENDING: i64 = 10_000;

const PENDING: &str = "
    SELECT (SELECT count(*) FROM (
            SELECT FROM outbox WHERE delivered_at IS NULL LIMIT $1) AS counted) AS pending,
        (extract(epoch FROM now() - (
            SELECT min(created_at) FROM outbox WHERE delivered_at IS NULL)) * 1000)::bigint AS oldest";

/// An event that is this replica's to deliver, for a while.
#[derive(Clone, Debug, QueryableByName)]
pub struct OutboxEvent {
    /// The same at every attempt.
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = Jsonb)]
    pub payload: Value,
    /// Counts this one.
    #[diesel(sql_type = Integer)]
    pub attempts: i32,
    #[diesel(sql_type = Timestamptz)]
    pub created_at: DateTime<Utc>,
}

#[derive(QueryableByName)]
struct PendingRow {
    #[diesel(sql_type = BigInt)]
    pending: i64,
    #[diesel(sql_type = Nullable<BigInt>)]
    oldest: Option<i64>,
}

#[derive(QueryableByName)]
struct IdRow {
    #[diesel(sql_type = SqlUuid)]
    id: Uuid,
}

impl Store {
    /// Puts those notices into the outbox that were not noticed before; returns how many. Whatever
    /// number of replicas notice the same, one event comes of it.
    ///
    /// # Errors
    /// `Unavailable`: perhaps it is done; it is safe to repeat
    pub async fn quota_notices_insert(&self, notices: &[QuotaNotice]) -> Result<usize> {
        if notices.is_empty() {
            return Ok(0);
        }
        let ids: Vec<Uuid> = notices.iter().map(|_| Uuid::now_v7()).collect();
        let months: Vec<String> = notices.iter().map(|one| one.period.to_string()).collect();
        let users: Vec<Uuid> = notices.iter().map(|one| one.user_id.0).collect();
        let thresholds: Vec<i32> = notices.iter().map(|one| one.threshold.into()).collect();
        let payloads: Vec<Value> = notices.iter().map(QuotaNotice::payload).collect();
        let mut conn = self.conn().await?;
        let inserted = diesel::sql_query(NOTICE)
            .bind::<Array<SqlUuid>, _>(ids)
            .bind::<Array<Text>, _>(months)
            .bind::<Array<SqlUuid>, _>(users)
            .bind::<Array<Integer>, _>(thresholds)
            .bind::<Array<Jsonb>, _>(payloads)
            .bind::<Text, _>(QuotaNotice::KIND)
            .execute(&mut conn)
            .await?;
        Ok(inserted)
    }

    /// Claims events of a kind that are due, at most `limit`, for so long: who has not delivered them
    /// by then has lost them to the next.
    ///
    /// # Errors
    /// `Unavailable`: some may be claimed
    pub async fn outbox_claim(
        &self,
        kind: &str,
        claim: Duration,
        limit: usize,
    ) -> Result<Vec<OutboxEvent>> {
        let mut conn = self.conn().await?;
        let claimed = diesel::sql_query(CLAIM)
            .bind::<Text, _>(kind)
            .bind::<BigInt, _>(millis(claim))
            .bind::<BigInt, _>(i64::try_from(limit).unwrap_or(i64::MAX))
            .load(&mut conn)
            .await?;
        Ok(claimed)
    }

    /// Says that an event is delivered.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn outbox_delivered(&self, id: Uuid) -> Result<()> {
        let mut conn = self.conn().await?;
        let delivered = "UPDATE outbox SET delivered_at = now(), last_error = NULL WHERE id = $1";
        diesel::sql_query(delivered)
            .bind::<SqlUuid, _>(id)
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// Gives an event back that could not be delivered, to be tried again after `pause`. What `why` says
    /// is kept: no secrets.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn outbox_failed(
        &self,
        event: &OutboxEvent,
        why: &str,
        pause: Duration,
    ) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::sql_query(FAILED)
            .bind::<SqlUuid, _>(event.id)
            .bind::<Integer, _>(event.attempts)
            .bind::<Text, _>(why)
            .bind::<BigInt, _>(millis(pause))
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// How many events are not delivered (10,000 stand for more), and the age of the oldest.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn outbox_pending(&self) -> Result<(u64, Option<Duration>)> {
        let mut conn = self.conn().await?;
        let row: PendingRow = diesel::sql_query(PENDING)
            .bind::<BigInt, _>(MOST_PENDING)
            .get_result(&mut conn)
            .await?;
        let age = |millis: i64| Duration::from_millis(u64::try_from(millis).unwrap_or(0));
        Ok((u64::try_from(row.pending).unwrap_or(0), row.oldest.map(age)))
    }

    /// Deletes events that were delivered before an instant; at most `limit` at a time.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn outbox_sweep(&self, before: DateTime<Utc>, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        let deleted = diesel::sql_query(
            "DELETE FROM outbox WHERE id IN (
                 SELECT id FROM outbox WHERE delivered_at < $1 LIMIT $2)",
        )
        .bind::<Timestamptz, _>(before)
        .bind::<BigInt, _>(limit)
        .execute(&mut conn)
        .await?;
        Ok(deleted)
    }

    /// Forgets what was noticed in the months before one; at most `limit` at a time.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn quota_notices_sweep(&self, before: Period, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        let deleted = diesel::sql_query(
            "DELETE FROM quota_notices WHERE (month, user_id, threshold) IN (
                 SELECT month, user_id, threshold FROM quota_notices WHERE month < $1 LIMIT $2)",
        )
        .bind::<Text, _>(before.to_string())
        .bind::<BigInt, _>(limit)
        .execute(&mut conn)
        .await?;
        Ok(deleted)
    }

    /// Users who have used something in a month. At most `limit`, by their ids, after `after`.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_users(
        &self,
        period: Period,
        after: Option<UserId>,
        limit: i64,
    ) -> Result<Vec<UserId>> {
        let mut conn = self.conn().await?;
        let rows: Vec<IdRow> = diesel::sql_query(USERS)
            .bind::<Text, _>(period.to_string())
            .bind::<SqlUuid, _>(after.map_or(Uuid::nil(), |user_id| user_id.0))
            .bind::<BigInt, _>(limit)
            .load(&mut conn)
            .await?;
        Ok(rows.into_iter().map(|row| UserId(row.id)).collect())
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
