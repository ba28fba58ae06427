//! How holds ended, where their owner has to learn it or to find out who was first. `docs/quota.md` says
//! why each statement is as it is.

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Bool, Text, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;
use tokio::time::timeout;
use uuid::Uuid;

use super::{Store, prepared::prepared, schema::quota_settlements};
use crate::{
    error::{Error, Result},
    model::{Ending, EventId, HoldId, HoldName, Kind, Period, ReplicaId, UserId},
};

impl Store {
    /// Says that holds of a replica ended without a commit, unless one was first; answers how each of
    /// them did end.
    ///
    /// # Errors
    /// `Unavailable`: perhaps it is said; it is safe to repeat
    pub async fn settlement_tombstones(
        &self,
        replica: ReplicaId,
        holds: &[(HoldId, Ending)],
    ) -> Result<Vec<(HoldId, Kind)>> {
        let mut conn = self.conn().await?;
        let ids: Vec<i64> = holds.iter().map(|(hold, _)| hold.0.cast_signed()).collect();
        let insert = InsertTombstones {
            replica: replica.0,
            holds: ids.clone(),
            kinds: holds.iter().map(|(_, ending)| name_of(*ending)).collect(),
        };
        let rows = timeout(self.patience(), async {
            insert.execute(&mut conn).await?;
            // Another statement: what the insert stumbled over is not in its own snapshot.
            let rows = quota_settlements::table
                .filter(quota_settlements::replica_id.eq(replica.0))
                .filter(quota_settlements::hold_id.eq_any(ids))
                .select(SETTLEMENT);
            Ok(rows.load(&mut conn).await?)
        });
        let rows = rows.await;
        let rows: Vec<(i64, String, i64)> = self.answered(conn, rows)?;
        rows.into_iter().map(settlement).collect()
    }

    /// How holds of a replica ended, of those after `after`, by their ids.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn settlement_list(
        &self,
        replica: ReplicaId,
        after: Option<HoldId>,
        limit: i64,
    ) -> Result<Vec<(HoldId, Kind)>> {
        let mut conn = self.conn().await?;
        let after = after.map_or(i64::MIN, |hold| hold.0.cast_signed());
        let rows: Vec<(i64, String, i64)> = quota_settlements::table
            .filter(quota_settlements::replica_id.eq(replica.0))
            .filter(quota_settlements::hold_id.gt(after))
            .select(SETTLEMENT)
            .order(quota_settlements::hold_id)
            .limit(limit)
            .load(&mut conn)
            .await?;
        rows.into_iter().map(settlement).collect()
    }

    /// Forgets how holds ended: their owner knows.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn settlement_delete(&self, replica: ReplicaId, holds: &[HoldId]) -> Result<()> {
        let holds: Vec<i64> = holds.iter().map(|hold| hold.0.cast_signed()).collect();
        let mut conn = self.conn().await?;
        let of_replica = quota_settlements::table
            .filter(quota_settlements::replica_id.eq(replica.0))
            .filter(quota_settlements::hold_id.eq_any(holds));
        let deleted = timeout(self.patience(), async {
            Ok(diesel::delete(of_replica).execute(&mut conn).await?)
        });
        let deleted = deleted.await;
        self.answered(conn, deleted)?;
        Ok(())
    }

    /// Releases a hold of any replica, unless the event that its commit books is there. Answers whether
    /// it ended without a commit: now, or before.
    ///
    /// # Errors
    /// `Unavailable`: perhaps it is released; it is safe to repeat
    pub async fn hold_release(
        &self,
        name: HoldName,
        period: Period,
        user_id: UserId,
        event_id: EventId,
    ) -> Result<bool> {
        let mut conn = self.conn().await?;
        let release = Release {
            replica: name.owner.0,
            hold: name.hold.0.cast_signed(),
            event: EventKey::new(period, user_id, event_id),
        };
        if release.execute(&mut conn).await? == 1 {
            return Ok(true);
        }
        // A statement of its own: it sees what the insert stumbled over.
        let booked = IsBooked(EventKey::new(period, user_id, event_id));
        Ok(!booked.get_result::<bool>(&mut conn).await?)
    }

    /// Whether an event is booked.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn is_booked(
        &self,
        period: Period,
        user_id: UserId,
        event_id: EventId,
    ) -> Result<bool> {
        let mut conn = self.conn().await?;
        let booked = IsBooked(EventKey::new(period, user_id, event_id));
        Ok(booked.get_result(&mut conn).await?)
    }
}

const SETTLEMENT: (
    quota_settlements::hold_id,
    quota_settlements::kind,
    quota_settlements::tokens,
) = (
    quota_settlements::hold_id,
    quota_settlements::kind,
    quota_settlements::tokens,
);

fn settlement((hold, kind, tokens): (i64, String, i64)) -> Result<(HoldId, Kind)> {
    let kind = match kind.as_str() {
        "committed" => Kind::Committed(tokens),
        "released" => Kind::Ended(Ending::Released),
        "expired" => Kind::Ended(Ending::Expired),
        _ => return Err(Error::internal("a settlement of no known kind")),
    };
    Ok((HoldId(hold.cast_unsigned()), kind))
}

fn name_of(ending: Ending) -> &'static str {
    match ending {
        Ending::Expired => "expired",
        Ending::Released => "released",
    }
}

prepared! {
    InsertTombstones => () = Self;
    Release => () = Self;
    IsBooked => Bool = Self;
}

struct InsertTombstones {
    replica: Uuid,
    holds: Vec<i64>,
    kinds: Vec<&'static str>,
}

impl QueryFragment<Pg> for InsertTombstones {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("INSERT INTO quota_settlements (replica_id, hold_id, kind, tokens) SELECT ");
        out.push_bind_param::<SqlUuid, _>(&self.replica)?;
        out.push_sql(", hold_id, kind, 0 FROM unnest(");
        out.push_bind_param::<Array<BigInt>, _>(&self.holds)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<Text>, _>(&self.kinds)?;
        out.push_sql(") AS t (hold_id, kind) ORDER BY hold_id ON CONFLICT DO NOTHING");
        Ok(())
    }
}

/// The usage event that a commit books.
struct EventKey {
    month: String,
    user: Uuid,
    event: Uuid,
}

impl EventKey {
    fn new(period: Period, user_id: UserId, event_id: EventId) -> Self {
        Self {
            month: period.to_string(),
            user: user_id.0,
            event: event_id.0,
        }
    }

    fn walk<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("EXISTS (SELECT FROM usage_records WHERE usage_month = ");
        out.push_bind_param::<Text, _>(&self.month)?;
        out.push_sql(" AND user_id = ");
        out.push_bind_param::<SqlUuid, _>(&self.user)?;
        out.push_sql(" AND event_id = ");
        out.push_bind_param::<SqlUuid, _>(&self.event)?;
        out.push_sql(")");
        Ok(())
    }
}

struct Release {
    replica: Uuid,
    hold: i64,
    event: EventKey,
}

impl QueryFragment<Pg> for Release {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("INSERT INTO quota_settlements (replica_id, hold_id, kind, tokens) SELECT ");
        out.push_bind_param::<SqlUuid, _>(&self.replica)?;
        out.push_sql(", ");
        out.push_bind_param::<BigInt, _>(&self.hold)?;
        out.push_sql(", 'released', 0 WHERE NOT ");
        self.event.walk(&mut out)?;
        out.push_sql(" ON CONFLICT DO NOTHING");
        Ok(())
    }
}

struct IsBooked(EventKey);

impl QueryFragment<Pg> for IsBooked {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT ");
        self.0.walk(&mut out)
    }
}
