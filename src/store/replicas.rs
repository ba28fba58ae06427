//! Who admits from leases, until when, and what becomes of the leases of the dead. `docs/quota.md` says
//! why each statement is as it is.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use tokio::time::{error::Elapsed, timeout};
use uuid::Uuid;

use super::{Store, leases::Meters, prepared::prepared};
use crate::{
    error::{Error, Result},
    model::ReplicaId,
};

/// What a heartbeat brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The time of the database.
    pub now: DateTime<Utc>,
    /// Replicas that live, this one among them.
    pub replicas: u32,
}

/// A lease without tokens is forgotten after so long: no statement is as old, so none that comes late
/// can be taken for a new one.
const FORGET_AFTER: Duration = Duration::from_mins(30);

impl Store {
    /// Makes a replica known. Repeated, it changes nothing.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn replica_register(&self, id: ReplicaId, ttl: Duration) -> Result<()> {
        let mut conn = self.conn().await?;
        let register = Register {
            id: id.0,
            ttl_ms: millis(ttl),
        };
        let registered = timeout(self.patience(), async {
            register.execute(&mut conn).await?;
            Ok(())
        });
        let registered = registered.await;
        self.answered(conn, registered)
    }

    /// The replica lives for `ttl` more, and none of its holds ends later than in `holds`. Takes nothing
    /// back that an earlier heartbeat promised. `None`: it is dead, its leases are others'.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn replica_heartbeat(
        &self,
        id: ReplicaId,
        ttl: Duration,
        holds: Duration,
    ) -> Result<Option<Heard>> {
        let mut conn = self.conn().await?;
        let beat = Beat {
            id: id.0,
            ttl_ms: millis(ttl),
            holds_ms: millis(holds),
        };
        let beaten = timeout(ttl / 4, async {
            Ok(beat.get_result(&mut conn).await.optional()?)
        });
        let beaten = beaten.await;
        let heard: Option<(DateTime<Utc>, i64)> = self.answered(conn, beaten)?;
        Ok(heard.map(|(now, replicas)| Heard {
            now,
            replicas: u32::try_from(replicas).unwrap_or(u32::MAX).max(1),
        }))
    }

    /// Takes the leases of replicas away that are over since `margin`, and those that whoever began it
    /// left; at most `batch` at a time. Answers the replicas that are gone.
    ///
    /// # Errors
    /// `Unavailable`: what was done stays, the next call goes on
    pub async fn replica_reap(&self, margin: Duration, batch: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        let reaped = reap(margin, batch, self.patience(), &mut conn).await;
        self.answered(conn, reaped)
    }

    /// Forgets leases that have been empty for long, and settlements of replicas that are gone, at most
    /// `batch` of these at a time.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn lease_sweep(&self, batch: i64) -> Result<()> {
        let mut conn = self.conn().await?;
        let swept = sweep(batch, self.patience(), &mut conn).await;
        self.answered(conn, swept)
    }
}

/// See [`Store::replica_reap`]. Each step is waited for by itself.
async fn reap(
    margin: Duration,
    batch: i64,
    patience: Duration,
    conn: &mut AsyncPgConnection,
) -> Result<Result<usize>, Elapsed> {
    let margin_ms = millis(margin);
    let condemned = conn.transaction::<_, Error, _>(async |conn| {
        Condemn { margin_ms }.execute(conn).await?;
        Ok(Dead.load(conn).await?)
    });
    let dead: Vec<Uuid> = match timeout(patience, condemned).await? {
        Ok(dead) => dead,
        Err(error) => return Ok(Err(error)),
    };
    // First what others wait for, of all of them: one that cannot be buried keeps nobody else's.
    for replica in &dead {
        loop {
            match timeout(patience, reap_batch(*replica, batch, conn)).await? {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Ok(Err(error)),
            }
        }
    }
    for replica in &dead {
        if let Err(error) = forget_settlements(*replica, batch, patience, conn).await? {
            return Ok(Err(error));
        }
        if let Err(error) = timeout(patience, Bury(*replica).execute(conn)).await? {
            return Ok(Err(error.into()));
        }
    }
    Ok(Ok(dead.len()))
}

/// See [`Store::lease_sweep`].
async fn sweep(
    batch: i64,
    patience: Duration,
    conn: &mut AsyncPgConnection,
) -> Result<Result<()>, Elapsed> {
    let before_ms = millis(FORGET_AFTER);
    let orphaned = timeout(patience, async {
        ForgetLeases { before_ms }.execute(conn).await?;
        // What came after its owner had been buried.
        Orphaned.load(conn).await
    });
    let orphaned: Vec<Uuid> = match orphaned.await? {
        Ok(orphaned) => orphaned,
        Err(error) => return Ok(Err(error.into())),
    };
    for replica in orphaned {
        if let Err(error) = forget_settlements(replica, batch, patience, conn).await? {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

/// Takes some of a dead replica's leases away; answers how many there were.
async fn reap_batch(replica: Uuid, batch: i64, conn: &mut AsyncPgConnection) -> Result<usize> {
    conn.transaction::<_, Error, _>(async |conn| {
        let rows: Vec<(Uuid, String, String)> = LeasesOf { replica, batch }.load(conn).await?;
        let meters = Meters::from_rows(rows);
        meters.lock(conn).await?;
        // Another reaper may have had the locks before.
        TakeAway(replica, &meters).execute(conn).await?;
        Ok(meters.len())
    })
    .await
}

async fn forget_settlements(
    replica: Uuid,
    batch: i64,
    patience: Duration,
    conn: &mut AsyncPgConnection,
) -> Result<Result<()>, Elapsed> {
    loop {
        let forget = ForgetSettlements { replica, batch };
        match timeout(patience, forget.execute(conn)).await? {
            Ok(0) => return Ok(Ok(())),
            Ok(_) => {}
            Err(error) => return Ok(Err(error.into())),
        }
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

prepared! {
    Register => () = Self;
    Beat => (Timestamptz, BigInt) = Self;
    Condemn => () = Self;
    Dead => SqlUuid = Self;
    LeasesOf => (SqlUuid, Text, Text) = Self;
    TakeAway<'a> => () = TakeAway<'static>;
    Bury => () = Self;
    ForgetLeases => () = Self;
    ForgetSettlements => () = Self;
    Orphaned => SqlUuid = Self;
}

const MILLISECONDS: &str = " * interval '1 millisecond'";

struct Register {
    id: Uuid,
    ttl_ms: i64,
}

impl QueryFragment<Pg> for Register {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("INSERT INTO replicas (id, expires_at, holds_until) VALUES (");
        out.push_bind_param::<SqlUuid, _>(&self.id)?;
        out.push_sql(", now() + ");
        out.push_bind_param::<BigInt, _>(&self.ttl_ms)?;
        out.push_sql(MILLISECONDS);
        out.push_sql(", now()) ON CONFLICT (id) DO NOTHING");
        Ok(())
    }
}

/// The greatest of what was promised: a heartbeat that was held up must not take back what a later one
/// said.
struct Beat {
    id: Uuid,
    ttl_ms: i64,
    holds_ms: i64,
}

impl QueryFragment<Pg> for Beat {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("UPDATE replicas SET expires_at = greatest(expires_at, now() + ");
        out.push_bind_param::<BigInt, _>(&self.ttl_ms)?;
        out.push_sql(MILLISECONDS);
        out.push_sql("), holds_until = greatest(holds_until, now() + ");
        out.push_bind_param::<BigInt, _>(&self.holds_ms)?;
        out.push_sql(MILLISECONDS);
        out.push_sql(") WHERE id = ");
        out.push_bind_param::<SqlUuid, _>(&self.id)?;
        out.push_sql(
            " AND NOT is_dead
             RETURNING now(),
                 (SELECT count(*) FROM replicas WHERE NOT is_dead AND expires_at > now())",
        );
        Ok(())
    }
}

/// From here on no heartbeat revives them and no operation of theirs is carried out. Waits for none
/// that is under way: those replicas live.
struct Condemn {
    margin_ms: i64,
}

impl QueryFragment<Pg> for Condemn {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "WITH over AS (
                 SELECT id FROM replicas
                 WHERE NOT is_dead AND greatest(expires_at, holds_until) + ",
        );
        out.push_bind_param::<BigInt, _>(&self.margin_ms)?;
        out.push_sql(MILLISECONDS);
        out.push_sql(
            " <= now()
                 FOR UPDATE SKIP LOCKED
             )
             UPDATE replicas AS r SET is_dead = true FROM over WHERE r.id = over.id",
        );
        Ok(())
    }
}

struct Dead;

impl QueryFragment<Pg> for Dead {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT id FROM replicas WHERE is_dead ORDER BY id");
        Ok(())
    }
}

struct LeasesOf {
    replica: Uuid,
    batch: i64,
}

impl QueryFragment<Pg> for LeasesOf {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT user_id, month, model FROM quota_leases WHERE replica_id = ");
        out.push_bind_param::<SqlUuid, _>(&self.replica)?;
        out.push_sql(" LIMIT ");
        out.push_bind_param::<BigInt, _>(&self.batch)
    }
}

struct TakeAway<'a>(Uuid, &'a Meters);

impl QueryFragment<Pg> for TakeAway<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("WITH gone AS (DELETE FROM quota_leases AS l USING unnest(");
        self.1.bind(&mut out)?;
        out.push_sql(
            ") AS k (user_id, month, model)
                 WHERE (l.user_id, l.month, l.model) = (k.user_id, k.month, k.model)
                     AND l.replica_id = ",
        );
        out.push_bind_param::<SqlUuid, _>(&self.0)?;
        out.push_sql(
            " RETURNING l.user_id, l.month, l.model, l.granted
             )
             UPDATE quota_balances AS b SET leased = b.leased - gone.granted
             FROM gone
             WHERE (b.user_id, b.month, b.model) = (gone.user_id, gone.month, gone.model)",
        );
        Ok(())
    }
}

/// A dead replica without leases.
struct Bury(Uuid);

impl QueryFragment<Pg> for Bury {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("DELETE FROM replicas AS r WHERE r.id = ");
        out.push_bind_param::<SqlUuid, _>(&self.0)?;
        out.push_sql(
            " AND r.is_dead
             AND NOT EXISTS (SELECT FROM quota_leases AS l WHERE l.replica_id = r.id)",
        );
        Ok(())
    }
}

/// None that an operation has locked.
struct ForgetLeases {
    before_ms: i64,
}

impl QueryFragment<Pg> for ForgetLeases {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "WITH empty AS (
                 SELECT ctid FROM quota_leases
                 WHERE granted = 0 AND operated_at < now() - ",
        );
        out.push_bind_param::<BigInt, _>(&self.before_ms)?;
        out.push_sql(MILLISECONDS);
        out.push_sql(
            " FOR UPDATE SKIP LOCKED
             )
             DELETE FROM quota_leases AS l USING empty WHERE l.ctid = empty.ctid",
        );
        Ok(())
    }
}

/// Some of what was told to a replica that is gone.
struct ForgetSettlements {
    replica: Uuid,
    batch: i64,
}

impl QueryFragment<Pg> for ForgetSettlements {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "DELETE FROM quota_settlements WHERE (replica_id, hold_id) IN (
                 SELECT replica_id, hold_id FROM quota_settlements WHERE replica_id = ",
        );
        out.push_bind_param::<SqlUuid, _>(&self.replica)?;
        out.push_sql(" LIMIT ");
        out.push_bind_param::<BigInt, _>(&self.batch)?;
        out.push_sql(")");
        Ok(())
    }
}

/// Replicas that are gone and to which something was told.
struct Orphaned;

impl QueryFragment<Pg> for Orphaned {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT DISTINCT s.replica_id FROM quota_settlements AS s
             WHERE NOT EXISTS (SELECT FROM replicas AS r WHERE r.id = s.replica_id)",
        );
        Ok(())
    }
}
