//! The monthly partitions of usage and audit.

use std::time::Duration;

use diesel::{
    OptionalExtension as _, QueryableByName,
    sql_types::{BigInt, Integer, Text},
};
use diesel_async::{
    AsyncConnection as _, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _,
};

use super::{Store, errors::stored};
use crate::{
    error::{Error, Result},
    model::Period,
};

/// Held while partitions are made or dropped: two replicas at the same one would collide.
const LOCK: i64 = 0x746f_6c6c_0002;

/// Longest wait for a table that others read or write. Meanwhile those who come later queue behind.
const LOCK_WAIT: Duration = Duration::from_millis(250);

/// A table that is partitioned by months.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partitioned {
    Usage,
    Audit,
}

impl Partitioned {
    fn table(self) -> &'static str {
        match self {
            Self::Usage => "usage_records",
            Self::Audit => "audit_events",
        }
    }

    /// The months of the partitions that the service made.
    fn months(self) -> String {
        let table = self.table();
        format!(
            "SELECT replace(right(p.relname, 7), '_', '-') AS month
             FROM pg_inherits JOIN pg_class AS p ON p.oid = inhrelid
             WHERE inhparent = '{table}'::regclass AND p.relname ~ '^{table}_[0-9]{{4}}_[0-9]{{2}}$'"
        )
    }
}

#[derive(QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    count: i64,
}

#[derive(QueryableByName)]
struct Month {
    #[diesel(sql_type = Text)]
    month: String,
}

impl Store {
    /// Makes the partitions of `months` that are missing, and moves into them what the default
    /// partition took meanwhile. Idempotent, and safe on many replicas.
    ///
    /// # Errors
    /// `Unavailable`, also when one was missing and somebody reads the table for long: try again
    /// later
    pub async fn partitions_ensure(&self, months: &[Period]) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            take_turn(conn).await?;
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

    /// The months whose usage records have a partition of their own.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_partitions(&self) -> Result<Vec<Period>> {
        let mut conn = self.conn().await?;
        let made = diesel::sql_query(Partitioned::Usage.months());
        months(made.load(&mut conn).await?)
    }

    /// The months with a partition of a table that ended `months` full months ago or before, oldest first; by the clock of
    /// Postgres, so that the wrong one of a replica deletes nothing.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn partitions_older(&self, of: Partitioned, months_kept: u32) -> Result<Vec<Period>> {
        let mut conn = self.conn().await?;
        let older = format!(
            "SELECT month FROM ({}) AS made WHERE month COLLATE \"C\" <
                 to_char((now() AT TIME ZONE 'UTC') - make_interval(months => $1), 'YYYY-MM')
             ORDER BY month",
            of.months()
        );
        let kept = i32::try_from(months_kept).map_err(Error::internal)?;
        let older = diesel::sql_query(older).bind::<Integer, _>(kept);
        months(older.load(&mut conn).await?)
    }

    /// Drops a month of a table. Says how many rows there were, about, or −1
    /// when that is not known; `None` when another replica was quicker.
    ///
    /// # Errors
    /// `Unavailable`, also when somebody reads the table for long: nothing was dropped, try again
    /// later
    pub async fn partition_drop(&self, of: Partitioned, month: Period) -> Result<Option<i64>> {
        let name = name(of.table(), month);
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            take_turn(conn).await?;
            let rows = format!(
                "SELECT reltuples::bigint AS count FROM pg_class WHERE oid = to_regclass('{name}')"
            );
            let rows: Option<Count> = diesel::sql_query(rows).get_result(conn).await.optional()?;
            if rows.is_some() {
                conn.batch_execute(&format!("DROP TABLE {name}")).await?;
            }
            Ok(rows.map(|Count { count }| count))
        })
        .await
    }
}

/// Waits until no other replica makes or drops partitions, which is in nobody's way; from then on
/// the transaction waits shortly.
async fn take_turn(conn: &mut AsyncPgConnection) -> Result<()> {
    let wait = LOCK_WAIT.as_millis();
    let turn = format!("SELECT pg_advisory_xact_lock({LOCK}); SET LOCAL lock_timeout = {wait}");
    Ok(conn.batch_execute(&turn).await?)
}

fn months(rows: Vec<Month>) -> Result<Vec<Period>> {
    rows.into_iter()
        .map(|row| stored("name of a partition", &row.month))
        .collect()
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
    let name = name(table, month);
    format!(
        "DO $$ BEGIN
             IF to_regclass('{name}') IS NULL THEN
                 LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE;
                 CREATE TABLE {name}
                     (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STATISTICS);
                 WITH stray AS (DELETE FROM {table}_default WHERE {rows} RETURNING *)
                     INSERT INTO {name} SELECT * FROM stray;
                 ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES {values};
             END IF;
         END $$;"
    )
}

fn name(table: &str, month: Period) -> String {
    format!("{table}_{}", month.to_string().replace('-', "_"))
}
