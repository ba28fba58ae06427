//! What others are to be told: written once, delivered at least once.

use diesel::{
    prelude::*,
    sql_types::{Array, BigInt, Integer, Jsonb, Text, Uuid as SqlUuid},
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
