//! The monthly partitions of usage and audit.

use diesel::{QueryableByName, sql_types::BigInt};
use diesel_async::{AsyncConnection as _, RunQueryDsl, SimpleAsyncConnection as _};

use super::Store;
use crate::{
    error::{Error, Result},
    model::Period,
};

/// Held while partitions are made: two replicas making the same one would collide.
const LOCK: i64 = 0x746f_6c6c_0002;

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

impl Store {
    /// Makes the partitions of `months` that are missing. Idempotent, and safe on many replicas.
    pub async fn partitions_ensure(&self, months: &[Period]) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            conn.batch_execute(&format!("SELECT pg_advisory_xact_lock({LOCK})"))
                .await?;
            for month in months {
                conn.batch_execute(&ddl(*month)).await?;
            }
            Ok(())
        })
        .await
    }

    /// Rows that no monthly partition took: each is a month that was not made ahead.
    pub async fn partitions_default_rows(&self) -> Result<i64> {
        let mut conn = self.conn().await?;
        // Counting stops early: more than a thousand is as alarming as a million.
        let Count { count } = diesel::sql_query(
            "SELECT count(*) AS count FROM (
                 (SELECT 1 FROM usage_records_default LIMIT 1000)
                 UNION ALL (SELECT 1 FROM audit_events_default LIMIT 1000)
             ) AS stray",
        )
        .get_result(&mut conn)
        .await?;
        Ok(count)
    }
}

/// A period prints as digits and a hyphen only, so it can stand in a statement.
fn ddl(month: Period) -> String {
    let suffix = month.to_string().replace('-', "_");
    let next = month.plus_months(1);
    format!(
        "CREATE TABLE IF NOT EXISTS usage_records_{suffix}
             PARTITION OF usage_records FOR VALUES IN ('{month}');
         CREATE TABLE IF NOT EXISTS audit_events_{suffix}
             PARTITION OF audit_events
             FOR VALUES FROM ('{month}-01 00:00:00+00') TO ('{next}-01 00:00:00+00');"
    )
}
