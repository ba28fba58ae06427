//! Leases: what replicas may admit from memory. `docs/quota.md` says why each statement is as it is.
//!
//! Locks are taken in the order replica, balances sorted, leases.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Nullable, Text, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    Store, errors::stored, prepared::prepared, quota::record_in_txn,
    quota_facts::quota_facts_in_txn, schema::quota_balances,
};
use crate::{
    error::{Error, Result},
    model::{
        Answer, Balance, Carried, EffectiveLimit, LeaseRow, LimitFacts, MeterName, ModelName,
        Operation, Period, ReplicaId, Tiers, Tokens, UserId, operate,
    },
};

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operated {
    /// `None`: a later one had been carried out, nobody waits for this one.
    pub answer: Option<Answer>,
    /// The meter as the transaction left it.
    pub balance: Balance,
}

impl Store {
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
        let operated = conn.transaction::<_, Error, _>(async |conn| {
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
            let bases = facts.record(&names, conn).await?;
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
                        let base = bases.get(name).copied();
                        writes.push(place, lease, leased - balance.leased, base);
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
            Ok(Some(all))
        });
        let operated = timeout(self.patience(), operated).await;
        self.answered(conn, operated)
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
}

/// A meter as its rows name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place(Uuid, String, String);

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
pub(super) struct Meters {
    users: Vec<Uuid>,
    months: Vec<String>,
    models: Vec<String>,
}

impl Meters {
    fn new(names: &[&MeterName]) -> Self {
        let places = names.iter().map(|name| Place::of(name));
        Self::from_rows(places.map(|Place(user, month, model)| (user, month, model)))
    }

    pub(super) fn from_rows(rows: impl IntoIterator<Item = (Uuid, String, String)>) -> Self {
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

    pub(super) fn len(&self) -> usize {
        self.users.len()
    }

    /// Locks the balances, and makes those that are missing; answers what is leased of each.
    pub(super) async fn lock(
        &self,
        conn: &mut AsyncPgConnection,
    ) -> Result<HashMap<Place, Tokens>> {
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

    pub(super) fn bind<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
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

    /// Writes down what was decided about the months whose total is locked, or answers the limits
    /// without credits that are to be written with their leases.
    async fn record<'a>(
        &self,
        names: &[&'a MeterName],
        conn: &mut AsyncPgConnection,
    ) -> Result<HashMap<&'a MeterName, Tokens>> {
        let mut bases = HashMap::new();
        for name in names.iter().filter(|name| name.model.is_none()) {
            let Some((facts, limit)) = self.0.get(&(name.user_id, name.period)) else {
                continue;
            };
            if limit.closing().next().is_some() {
                record_in_txn(facts, limit, conn).await?;
            } else if facts.recorded_base != Some(limit.base_to_record()) {
                bases.insert(*name, limit.base_to_record());
            }
        }
        Ok(bases)
    }
}

prepared! {
    Live => BigInt = Self;
    MakeBalances<'a> => () = MakeBalances<'static>;
    LockBalances<'a> => (SqlUuid, Text, Text, BigInt) = LockBalances<'static>;
    ReadLeases<'a> => (SqlUuid, Text, Text, BigInt, BigInt) = ReadLeases<'static>;
    WriteLeases => () = Self;
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
    /// The limit without credits, where it is to be written.
    bases: Vec<Option<i64>>,
}

impl Writes {
    fn push(&mut self, place: Place, lease: LeaseRow, change: Tokens, base: Option<Tokens>) {
        let Place(user, month, model) = place;
        self.users.push(user);
        self.months.push(month);
        self.models.push(model);
        self.granted.push(lease.granted);
        self.numbers.push(lease.number.cast_signed());
        self.changes.push(change);
        self.bases.push(base);
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
        out.push_sql(", ");
        out.push_bind_param::<Array<Nullable<BigInt>>, _>(&writes.bases)?;
        out.push_sql(
            ") AS w (user_id, month, model, granted, operation, change, base)
             ), leases AS (
                 INSERT INTO quota_leases AS l
                     (user_id, month, model, replica_id, granted, operation)
                 SELECT user_id, month, model, ",
        );
        out.push_bind_param::<SqlUuid, _>(replica)?;
        out.push_sql(
            ", granted, operation FROM written
                 ON CONFLICT (replica_id, user_id, month, model) DO UPDATE SET
                     granted = EXCLUDED.granted, operation = EXCLUDED.operation,
                     operated_at = EXCLUDED.operated_at
             )
             UPDATE quota_balances AS b
             SET leased = b.leased + w.change, base_limit = coalesce(w.base, b.base_limit)
             FROM written AS w
             WHERE (w.change <> 0 OR w.base IS NOT NULL)
                 AND (b.user_id, b.month, b.model) = (w.user_id, w.month, w.model)",
        );
        Ok(())
    }
}
