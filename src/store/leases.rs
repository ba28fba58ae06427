//! Leases: what replicas may admit from memory. `docs/quota.md` says why each statement is as it is.
//!
//! Locks are taken in the order replica, balances sorted, leases.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Bool, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use uuid::Uuid;

use super::{
    Store,
    errors::stored,
    quota::record_in_txn,
    quota_facts::quota_facts_in_txn,
    schema::{quota_balances, quota_settlements},
};
use crate::{
    error::{Error, Result},
    model::{
        Answer, Balance, Carried, EffectiveLimit, Ending, EventId, HoldId, HoldName, Kind,
        LeaseRow, LimitFacts, MeterName, ModelName, Operation, Period, ReplicaId, Tiers, Tokens,
        UserId, operate,
    },
};

/// What a heartbeat brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The time of the database.
    pub now: DateTime<Utc>,
    /// Replicas that live, this one among them.
    pub replicas: u32,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operated {
    /// `None`: a later one had been carried out, nobody waits for this one.
    pub answer: Option<Answer>,
    /// The meter as the transaction left it.
    pub balance: Balance,
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
        register.execute(&mut conn).await?;
        Ok(())
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
        let heard: Option<(DateTime<Utc>, i64)> = beat.get_result(&mut conn).await.optional()?;
        Ok(heard.map(|(now, replicas)| Heard {
            now,
            replicas: u32::try_from(replicas).unwrap_or(u32::MAX).max(1),
        }))
    }

    /// Carries operations on leases of one replica out, all or none, each meter's at most one; answers
    /// them in their order. `None`: the replica is dead, or was not heard of in time.
    ///
    /// # Errors
    /// `Unavailable`: perhaps they were carried out; repeated under their numbers, they are only once
    pub async fn lease_operations(
        &self,
        replica: ReplicaId,
        operations: &[(MeterName, Operation)],
        tiers: &Tiers,
    ) -> Result<Option<Vec<Operated>>> {
        if operations.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let live: Option<i64> = Live(replica.0).get_result(conn).await.optional()?;
            let Some(replicas) = live else {
                return Ok(None);
            };
            let names: Vec<&MeterName> = operations.iter().map(|(name, _)| name).collect();
            let meters = Meters::new(&names);
            let leased = meters.lock(conn).await?;
            // Statements of their own, begun after the locks were had: what has left a lease by now is
            // in the sums that these see.
            let facts = Facts::read(&names, tiers, conn).await?;
            let leases = meters.leases_of(replica, conn).await?;
            let replicas = u32::try_from(replicas).unwrap_or(u32::MAX);
            let mut writes = Writes::default();
            let mut all = Vec::with_capacity(operations.len());
            for (name, operation) in operations {
                let place = Place::of(name);
                let leased = leased.get(&place).copied();
                let leased = leased.ok_or_else(|| Error::internal("a balance is not there"))?;
                let balance = facts.balance(name, leased);
                let carried = operate(&balance, leases.get(&place).copied(), operation, replicas);
                let (answer, leased) = match carried {
                    Carried::Out {
                        lease,
                        leased,
                        answer,
                    } => {
                        writes.push(place, lease, leased - balance.leased);
                        (Some(answer), leased)
                    }
                    Carried::Before(answer) => (Some(answer), balance.leased),
                    Carried::Straggler => (None, balance.leased),
                };
                let balance = Balance { leased, ..balance };
                all.push(Operated { answer, balance });
            }
            if !writes.granted.is_empty() {
                let write = WriteLeases(replica.0, writes);
                write.execute(conn).await?;
            }
            facts.record(&names, conn).await?;
            Ok(Some(all))
        })
        .await
    }

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
        insert.execute(&mut conn).await?;
        // Another statement: what the insert stumbled over is not in its own snapshot.
        let rows: Vec<(i64, String, i64)> = quota_settlements::table
            .filter(quota_settlements::replica_id.eq(replica.0))
            .filter(quota_settlements::hold_id.eq_any(ids))
            .select(SETTLEMENT)
            .load(&mut conn)
            .await?;
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
        diesel::delete(of_replica).execute(&mut conn).await?;
        Ok(())
    }

    /// What replicas may admit of a user's month, of each model and, `None`, of all.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn leased(
        &self,
        user_id: UserId,
        period: Period,
    ) -> Result<BTreeMap<Option<ModelName>, Tokens>> {
        let mut conn = self.conn().await?;
        let rows: Vec<(String, i64)> = quota_balances::table
            .filter(quota_balances::user_id.eq(user_id.0))
            .filter(quota_balances::month.eq(period.to_string()))
            .filter(quota_balances::leased.gt(0))
            .select((quota_balances::model, quota_balances::leased))
            .load(&mut conn)
            .await?;
        let leased = |(model, leased): (String, i64)| {
            let model = match model.as_str() {
                "" => None,
                name => Some(stored("quota_balances.model", name)?),
            };
            Ok((model, leased))
        };
        rows.into_iter().map(leased).collect()
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

    /// Takes the leases of replicas away that are over since `margin`, and those that whoever began it
    /// left; at most `batch` at a time. Answers the replicas that are gone.
    ///
    /// # Errors
    /// `Unavailable`: what was done stays, the next call goes on
    pub async fn replica_reap(&self, margin: Duration, batch: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        let margin_ms = millis(margin);
        let dead: Vec<Uuid> = conn
            .transaction::<_, Error, _>(async |conn| {
                Condemn { margin_ms }.execute(conn).await?;
                Ok(Dead.load(conn).await?)
            })
            .await?;
        for replica in &dead {
            while reap_batch(*replica, batch, &mut conn).await? > 0 {}
            Bury(*replica).execute(&mut conn).await?;
        }
        Ok(dead.len())
    }

    /// Forgets leases that have been empty for long, and settlements of replicas that are gone.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn lease_sweep(&self) -> Result<()> {
        let mut conn = self.conn().await?;
        let before_ms = millis(FORGET_AFTER);
        ForgetLeases { before_ms }.execute(&mut conn).await?;
        ForgetSettlements.execute(&mut conn).await?;
        Ok(())
    }
}

/// Takes some of a dead replica's leases away; answers how many there were.
async fn reap_batch(replica: Uuid, batch: i64, conn: &mut AsyncPgConnection) -> Result<usize> {
    conn.transaction::<_, Error, _>(async |conn| {
        let rows: Vec<(Uuid, String, String)> = LeasesOf { replica, batch }.load(conn).await?;
        let meters = Meters::from_rows(rows);
        meters.lock(conn).await?;
        // Another reaper may have had the locks before.
        TakeAway(replica, &meters).execute(conn).await?;
        Ok(meters.users.len())
    })
    .await
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

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A meter as its rows name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place(Uuid, String, String);

impl Place {
    fn of(name: &MeterName) -> Self {
        let model = name.model.as_ref().map(ToString::to_string);
        Self(
            name.user_id.0,
            name.period.to_string(),
            model.unwrap_or_default(),
        )
    }
}

/// The keys of meters, as columns.
struct Meters {
    users: Vec<Uuid>,
    months: Vec<String>,
    models: Vec<String>,
}

impl Meters {
    fn new(names: &[&MeterName]) -> Self {
        let places = names.iter().map(|name| Place::of(name));
        Self::from_rows(places.map(|Place(user, month, model)| (user, month, model)))
    }

    fn from_rows(rows: impl IntoIterator<Item = (Uuid, String, String)>) -> Self {
        let mut all = Self {
            users: Vec::new(),
            months: Vec::new(),
            models: Vec::new(),
        };
        for (user, month, model) in rows {
            all.users.push(user);
            all.months.push(month);
            all.models.push(model);
        }
        all
    }

    /// Locks the balances, and makes those that are missing; answers what is leased of each.
    async fn lock(&self, conn: &mut AsyncPgConnection) -> Result<HashMap<Place, Tokens>> {
        MakeBalances(self).execute(conn).await?;
        let rows: Vec<(Uuid, String, String, i64)> = LockBalances(self).load(conn).await?;
        let leased = |(user, month, model, leased)| (Place(user, month, model), leased);
        Ok(rows.into_iter().map(leased).collect())
    }

    async fn leases_of(
        &self,
        replica: ReplicaId,
        conn: &mut AsyncPgConnection,
    ) -> Result<HashMap<Place, LeaseRow>> {
        let rows: Vec<(Uuid, String, String, i64, i64)> =
            ReadLeases(replica.0, self).load(conn).await?;
        let lease = |(user, month, model, granted, number): (_, _, _, _, i64)| {
            let number = number.cast_unsigned();
            (Place(user, month, model), LeaseRow { granted, number })
        };
        Ok(rows.into_iter().map(lease).collect())
    }

    fn bind<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_bind_param::<Array<SqlUuid>, _>(&self.users)?;
        for texts in [&self.months, &self.models] {
            out.push_sql(", ");
            out.push_bind_param::<Array<Text>, _>(texts)?;
        }
        Ok(())
    }
}

/// What the limits follow from.
struct Facts(HashMap<(UserId, Period), (LimitFacts, EffectiveLimit)>);

impl Facts {
    async fn read(
        names: &[&MeterName],
        tiers: &Tiers,
        conn: &mut AsyncPgConnection,
    ) -> Result<Self> {
        let mut periods: BTreeMap<Period, BTreeSet<UserId>> = BTreeMap::new();
        for name in names {
            periods.entry(name.period).or_default().insert(name.user_id);
        }
        let mut all = HashMap::with_capacity(names.len());
        for (period, users) in periods {
            let users = Vec::from_iter(users);
            for facts in quota_facts_in_txn(&users, period, tiers, conn).await? {
                let limit = facts.limit(tiers);
                all.insert((facts.user_id, period), (facts, limit));
            }
        }
        Ok(Self(all))
    }

    fn balance(&self, name: &MeterName, leased: Tokens) -> Balance {
        let Some((facts, limit)) = self.0.get(&(name.user_id, name.period)) else {
            // Users who are gone get nothing.
            return Balance {
                limit: Some(0),
                committed: 0,
                leased,
            };
        };
        let (limit, committed) = match &name.model {
            None => (limit.tokens, facts.used),
            Some(model) => (
                limit.models.get(model).copied(),
                facts.used_by_model.get(model).copied().unwrap_or(0),
            ),
        };
        Balance {
            limit,
            committed,
            leased,
        }
    }

    /// Writes down what was decided about the months whose total is locked.
    async fn record(&self, names: &[&MeterName], conn: &mut AsyncPgConnection) -> Result<()> {
        let mut bases = Bases::default();
        for name in names.iter().filter(|name| name.model.is_none()) {
            let Some((facts, limit)) = self.0.get(&(name.user_id, name.period)) else {
                continue;
            };
            if limit.closing().next().is_some() {
                record_in_txn(facts, limit, conn).await?;
            } else if facts.recorded_base != Some(limit.base_to_record()) {
                bases.users.push(name.user_id.0);
                bases.months.push(name.period.to_string());
                bases.bases.push(limit.base_to_record());
            }
        }
        if !bases.users.is_empty() {
            bases.execute(conn).await?;
        }
        Ok(())
    }
}

/// Fragments with a static id are prepared once on a connection.
macro_rules! prepared {
    ($($name:ident $(<$life:lifetime>)? => $types:ty = $static:ty;)*) => {$(
        impl $(<$life>)? QueryId for $name $(<$life>)? {
            type QueryId = $static;
            const HAS_STATIC_QUERY_ID: bool = true;
        }

        impl $(<$life>)? Query for $name $(<$life>)? {
            type SqlType = $types;
        }
    )*};
}

prepared! {
    Register => () = Self;
    Beat => (Timestamptz, BigInt) = Self;
    Live => BigInt = Self;
    MakeBalances<'a> => () = MakeBalances<'static>;
    LockBalances<'a> => (SqlUuid, Text, Text, BigInt) = LockBalances<'static>;
    ReadLeases<'a> => (SqlUuid, Text, Text, BigInt, BigInt) = ReadLeases<'static>;
    WriteLeases => () = Self;
    Bases => () = Self;
    InsertTombstones => () = Self;
    Release => () = Self;
    IsBooked => Bool = Self;
    Condemn => () = Self;
    Dead => SqlUuid = Self;
    LeasesOf => (SqlUuid, Text, Text) = Self;
    TakeAway<'a> => () = TakeAway<'static>;
    Bury => () = Self;
    ForgetLeases => () = Self;
    ForgetSettlements => () = Self;
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

/// Keeps the replica from being reaped for as long as the transaction lasts, and lets heartbeats
/// pass.
struct Live(Uuid);

impl QueryFragment<Pg> for Live {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT (SELECT count(*) FROM replicas WHERE NOT is_dead AND expires_at > now())
             FROM replicas WHERE id = ",
        );
        out.push_bind_param::<SqlUuid, _>(&self.0)?;
        out.push_sql(" AND NOT is_dead AND expires_at > now() FOR KEY SHARE");
        Ok(())
    }
}

/// Sorted, for whoever inserts the same row waits.
struct MakeBalances<'a>(&'a Meters);

impl QueryFragment<Pg> for MakeBalances<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "INSERT INTO quota_balances (user_id, month, model)
             SELECT * FROM unnest(",
        );
        self.0.bind(&mut out)?;
        out.push_sql(") AS k (user_id, month, model) ORDER BY 1, 2, 3 ON CONFLICT DO NOTHING");
        Ok(())
    }
}

struct LockBalances<'a>(&'a Meters);

impl QueryFragment<Pg> for LockBalances<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT b.user_id, b.month, b.model, b.leased
             FROM quota_balances AS b JOIN unnest(",
        );
        self.0.bind(&mut out)?;
        out.push_sql(
            ") AS k (user_id, month, model) USING (user_id, month, model)
             ORDER BY b.user_id, b.month, b.model FOR NO KEY UPDATE OF b",
        );
        Ok(())
    }
}

struct ReadLeases<'a>(Uuid, &'a Meters);

impl QueryFragment<Pg> for ReadLeases<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT l.user_id, l.month, l.model, l.granted, l.operation
             FROM quota_leases AS l JOIN unnest(",
        );
        self.1.bind(&mut out)?;
        out.push_sql(
            ") AS k (user_id, month, model) USING (user_id, month, model)
             WHERE l.replica_id = ",
        );
        out.push_bind_param::<SqlUuid, _>(&self.0)
    }
}

/// Leases to write, and by how much what is leased of their meters changes.
#[derive(Default)]
struct Writes {
    users: Vec<Uuid>,
    months: Vec<String>,
    models: Vec<String>,
    granted: Vec<i64>,
    numbers: Vec<i64>,
    changes: Vec<i64>,
}

impl Writes {
    fn push(&mut self, place: Place, lease: LeaseRow, change: Tokens) {
        let Place(user, month, model) = place;
        self.users.push(user);
        self.months.push(month);
        self.models.push(model);
        self.granted.push(lease.granted);
        self.numbers.push(lease.number.cast_signed());
        self.changes.push(change);
    }
}

struct WriteLeases(Uuid, Writes);

impl QueryFragment<Pg> for WriteLeases {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let Self(replica, writes) = self;
        out.push_sql("WITH written AS (SELECT * FROM unnest(");
        out.push_bind_param::<Array<SqlUuid>, _>(&writes.users)?;
        for texts in [&writes.months, &writes.models] {
            out.push_sql(", ");
            out.push_bind_param::<Array<Text>, _>(texts)?;
        }
        for numbers in [&writes.granted, &writes.numbers, &writes.changes] {
            out.push_sql(", ");
            out.push_bind_param::<Array<BigInt>, _>(numbers)?;
        }
        out.push_sql(
            ") AS w (user_id, month, model, granted, operation, change)
             ), leases AS (
                 INSERT INTO quota_leases AS l
                     (user_id, month, model, replica_id, granted, operation)
                 SELECT user_id, month, model, ",
        );
        out.push_bind_param::<SqlUuid, _>(replica)?;
        out.push_sql(
            ", granted, operation FROM written
                 ON CONFLICT (user_id, month, model, replica_id) DO UPDATE SET
                     granted = EXCLUDED.granted, operation = EXCLUDED.operation,
                     operated_at = EXCLUDED.operated_at
             )
             UPDATE quota_balances AS b SET leased = b.leased + w.change
             FROM written AS w
             WHERE w.change <> 0
                 AND (b.user_id, b.month, b.model) = (w.user_id, w.month, w.model)",
        );
        Ok(())
    }
}

#[derive(Default)]
struct Bases {
    users: Vec<Uuid>,
    months: Vec<String>,
    bases: Vec<i64>,
}

impl QueryFragment<Pg> for Bases {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("UPDATE quota_balances AS b SET base_limit = n.base FROM unnest(");
        out.push_bind_param::<Array<SqlUuid>, _>(&self.users)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<BigInt>, _>(&self.bases)?;
        out.push_sql(
            ") AS n (user_id, month, base)
             WHERE b.user_id = n.user_id AND b.month = n.month AND b.model = ''",
        );
        Ok(())
    }
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

/// A dead replica without leases, with what was told to it.
struct Bury(Uuid);

impl QueryFragment<Pg> for Bury {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("WITH gone AS (DELETE FROM replicas AS r WHERE r.id = ");
        out.push_bind_param::<SqlUuid, _>(&self.0)?;
        out.push_sql(
            " AND r.is_dead
                 AND NOT EXISTS (SELECT FROM quota_leases AS l WHERE l.replica_id = r.id)
                 RETURNING r.id
             )
             DELETE FROM quota_settlements AS s USING gone WHERE s.replica_id = gone.id",
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

/// What came after its owner had been reaped.
struct ForgetSettlements;

impl QueryFragment<Pg> for ForgetSettlements {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "DELETE FROM quota_settlements AS s
             WHERE NOT EXISTS (SELECT FROM replicas AS r WHERE r.id = s.replica_id)",
        );
        Ok(())
    }
}
