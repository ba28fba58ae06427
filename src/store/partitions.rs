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
    /// Makes the partitions of `months` that are missing, and moves into them what the default
    /// partition took meanwhile. Idempotent, and safe on many replicas.
    ///
    /// # Errors
    /// `Unavailable`
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

    /// Rows that no monthly partition took: each is of a month that was not made ahead. Counts up to
    /// a thousand of each table: more are no more alarming.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn partitions_default_rows(&self) -> Result<i64> {
        let mut conn = self.conn().await?;
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
    let (start, end) = (
        format!("'{month}-01 00:00:00+00'"),
        format!("'{}-01 00:00:00+00'", month.plus_months(1)),
    );
    let usage = partition(
        "usage_records",
        month,
        &format!("IN ('{month}')"),
        &format!("usage_month = '{month}'"),
    );
    let audit = partition(
        "audit_events",
        month,
        &format!("FROM ({start}) TO ({end})"),
        &format!("occurred_at >= {start} AND occurred_at < {end}"),
    );
    format!("{usage} {audit}")
}

/// Filled before it is attached: Postgres refuses a partition whose rows the default one holds. The
/// lock keeps new ones from coming in between.
fn partition(table: &str, month: Period, values: &str, rows: &str) -> String {
    let name = format!("{table}_{}", month.to_string().replace('-', "_"));
    format!(
        "DO $$ BEGIN
             IF to_regclass('{name}') IS NULL THEN
                 LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE;
                 CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS);
                 WITH stray AS (DELETE FROM {table}_default WHERE {rows} RETURNING *)
                     INSERT INTO {name} SELECT * FROM stray;
                 ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES {values};
             END IF;
         END $$;"
    )
}
