//! Booking events: the one statement that does it, for one or many at once.

use std::{
    collections::{HashMap, HashSet},
    io::Write as _,
};

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    result::Error as DieselError,
    serialize::{self, IsNull, Output, ToSql},
    sql_types::{Array, BigInt, Jsonb, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use tokio::time::timeout;
use uuid::Uuid;

use super::{Store, prepared::prepared, schema::user_erasures, usage::UsageRow};
use crate::{
    error::{Error, Result},
    model::{Booking, Labels, Period, UsageEvent, UsageRecord},
};

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageInsert {
    /// Booked, and added to the sums.
    Recorded,
    /// Booked before with the same payload; counted once.
    Duplicate,
    /// Booked before with another payload; nothing was done.
    Conflict,
}

/// What makes an event the same event.
type Key = (Period, Uuid, Uuid);

impl Store {
    /// Books events, each with the sums of its month, and says what became of each, in their order.
    ///
    /// All that are recorded are durable when it returns, in one transaction. Any number of calls
    /// with one event count once; events that are in `bookings` twice as well. The owners of holds
    /// that are settled are told in the same transaction.
    ///
    /// # Errors
    /// `Unavailable`: perhaps all are booked, perhaps none; it is safe to repeat · `TotalOutOfRange`,
    /// `Internal`: none is
    pub async fn usage_insert(&self, bookings: &[&Booking]) -> Result<Vec<UsageInsert>> {
        let mut conn = self.conn().await?;
        let inserted = timeout(self.patience(), insert(bookings, &mut conn)).await;
        self.answered(conn, inserted).map_err(|error| match error {
            Error::Internal(cause) if is_overflow(&*cause) => Error::TotalOutOfRange,
            error => error,
        })
    }
}

/// Whether a sum grew beyond its column. The driver does not hand the SQLSTATE on.
fn is_overflow(cause: &(dyn std::error::Error + 'static)) -> bool {
    matches!(
        cause.downcast_ref(),
        Some(DieselError::DatabaseError(_, info)) if info.message() == "bigint out of range"
    )
}

async fn insert(bookings: &[&Booking], conn: &mut AsyncPgConnection) -> Result<Vec<UsageInsert>> {
    let keys: Vec<Key> = bookings.iter().map(|one| key_of(&one.event)).collect();
    let mut order: Vec<usize> = (0..bookings.len()).collect();
    // Stable: of events with one key the first one counts.
    order.sort_by(|&a, &b| keys[a].cmp(&keys[b]));
    order.dedup_by(|&mut later, &mut first| keys[later] == keys[first]);
    let firsts: Vec<&UsageEvent> = order.iter().map(|&index| &bookings[index].event).collect();
    let settlements = Settlements::of(bookings);
    let known: Vec<i64> = match firsts[..] {
        _ if !settlements.is_empty() => {
            let events = InsertEvents::new(&firsts);
            let insert = InsertAndSettle {
                events,
                settlements,
            };
            insert.load(conn).await?
        }
        // It adds to one sum, unless the event was there.
        [event] => match InsertEvent::new(event).execute(conn).await? {
            0 => vec![1],
            _ => Vec::new(),
        },
        _ => InsertEvents::new(&firsts).load(conn).await?,
    };
    if known.is_empty() && firsts.len() == bookings.len() {
        return Ok(vec![UsageInsert::Recorded; bookings.len()]);
    }
    let known: Vec<&UsageEvent> = known
        .into_iter()
        .map(|place| {
            let place = usize::try_from(place - 1).ok();
            let event = place.and_then(|place| firsts.get(place)).copied();
            event.ok_or_else(|| Error::internal("an event that was not sent is known"))
        })
        .collect::<Result<_>>()?;
    // A statement of its own: its snapshot sees what the insert stumbled over.
    let booked = match known.is_empty() {
        true => HashMap::new(),
        false => booked(&known, conn).await?,
    };
    let known_keys: HashSet<Key> = known.iter().map(|event| key_of(event)).collect();
    let firsts: HashMap<&Key, usize> = order.iter().map(|&index| (&keys[index], index)).collect();
    let outcome = |index: usize| {
        let (booking, key) = (bookings[index], &keys[index]);
        let first = firsts[key];
        let is_known = known_keys.contains(key);
        if !is_known && first == index {
            return UsageInsert::Recorded;
        }
        let before = match is_known {
            true => booked.get(key),
            false => Some(&bookings[first].event),
        };
        if before.is_some_and(|before| booking.is_booked_as(before)) {
            UsageInsert::Duplicate
        } else {
            UsageInsert::Conflict
        }
    };
    let mut outcomes: Vec<UsageInsert> = (0..bookings.len()).map(outcome).collect();
    let differ = |(index, outcome): (usize, &UsageInsert)| {
        let is_known = *outcome == UsageInsert::Conflict && known_keys.contains(&keys[index]);
        is_known.then_some(index)
    };
    let conflicts: Vec<usize> = outcomes.iter().enumerate().filter_map(differ).collect();
    if !conflicts.is_empty() {
        let users: Vec<Uuid> = conflicts.iter().map(|&index| keys[index].1).collect();
        let erased = erased_among(&users, conn).await?;
        for index in conflicts {
            let before = booked.get(&keys[index]);
            if erased.contains(&keys[index].1)
                && before.is_some_and(|before| bookings[index].is_booked_as_blanked(before))
            {
                outcomes[index] = UsageInsert::Duplicate;
            }
        }
    }
    Ok(outcomes)
}

/// Which of these users were deleted: of their events not all is kept that would tell two apart.
async fn erased_among(users: &[Uuid], conn: &mut AsyncPgConnection) -> Result<HashSet<Uuid>> {
    let erased: Vec<Uuid> = user_erasures::table
        .filter(user_erasures::user_id.eq_any(users))
        .select(user_erasures::user_id)
        .load(conn)
        .await?;
    Ok(erased.into_iter().collect())
}

/// The events that are booked under the keys of `events`.
async fn booked(
    events: &[&UsageEvent],
    conn: &mut AsyncPgConnection,
) -> Result<HashMap<Key, UsageEvent>> {
    let rows: Vec<UsageRow> = BookedEvents::under(events).load(conn).await?;
    rows.into_iter()
        .map(|row| {
            let event = UsageRecord::try_from(row)?.event;
            Ok((key_of(&event), event))
        })
        .collect()
}

fn key_of(event: &UsageEvent) -> Key {
    (event.period(), event.user_id.0, event.event_id.0)
}

/// Looks events up by their keys, row by row: as lists of months, users and ids, Postgres would look
/// for every combination of them.
struct BookedEvents {
    months: Vec<String>,
    user_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
}

impl BookedEvents {
    fn under(events: &[&UsageEvent]) -> Self {
        Self {
            months: events
                .iter()
                .map(|event| event.period().to_string())
                .collect(),
            user_ids: events.iter().map(|event| event.user_id.0).collect(),
            event_ids: events.iter().map(|event| event.event_id.0).collect(),
        }
    }
}

impl QueryFragment<Pg> for BookedEvents {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "SELECT r.user_id, r.event_id, r.occurred_at, r.model, r.input_tokens, r.output_tokens,
                 r.cached_input_tokens, r.cache_write_tokens, r.reasoning_tokens, r.request_id,
                 r.labels, r.recorded_at
             FROM unnest(",
        );
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        for ids in [&self.user_ids, &self.event_ids] {
            out.push_sql(", ");
            out.push_bind_param::<Array<SqlUuid>, _>(ids)?;
        }
        out.push_sql(
            ") AS k (usage_month, user_id, event_id)
             JOIN usage_records AS r USING (usage_month, user_id, event_id)",
        );
        Ok(())
    }
}

prepared! {
    BookedEvents => UsageRowTypes = Self;
}

/// The types of the columns of [`UsageRow`].
pub(super) type UsageRowTypes = (
    SqlUuid,
    SqlUuid,
    Timestamptz,
    Text,
    BigInt,
    BigInt,
    BigInt,
    BigInt,
    BigInt,
    Text,
    Jsonb,
    Timestamptz,
);

/// Inserts events that are not there yet and adds just those to the sums; returns the places, from 1
/// on, of the others, which are seldom any.
///
/// A fragment of its own with a static id: diesel would prepare an upsert anew on every call. Keys
/// are inserted and upserted in sorted order, so that concurrent batches never wait for each other in
/// a circle.
struct InsertEvents<'a> {
    months: Vec<String>,
    user_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
    occurred_at: Vec<DateTime<Utc>>,
    models: Vec<&'a str>,
    input: Vec<i64>,
    output: Vec<i64>,
    cached_input: Vec<i64>,
    cache_write: Vec<i64>,
    reasoning: Vec<i64>,
    request_ids: Vec<&'a str>,
    labels: Vec<LabelsJson<'a>>,
}

impl<'a> InsertEvents<'a> {
    fn new(events: &[&'a UsageEvent]) -> Self {
        let column =
            |value: fn(&UsageEvent) -> i64| events.iter().map(|event| value(event)).collect();
        Self {
            months: events
                .iter()
                .map(|event| event.period().to_string())
                .collect(),
            user_ids: events.iter().map(|event| event.user_id.0).collect(),
            event_ids: events.iter().map(|event| event.event_id.0).collect(),
            occurred_at: events.iter().map(|event| event.occurred_at).collect(),
            models: events.iter().map(|event| event.model.as_str()).collect(),
            input: column(|event| event.tokens.input),
            output: column(|event| event.tokens.output),
            cached_input: column(|event| event.tokens.cached_input),
            cache_write: column(|event| event.tokens.cache_write),
            reasoning: column(|event| event.tokens.reasoning),
            request_ids: events.iter().map(|event| &*event.request_id).collect(),
            labels: events
                .iter()
                .map(|event| LabelsJson(&event.labels))
                .collect(),
        }
    }
}

impl QueryFragment<Pg> for InsertEvents<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        walk_insert(out, &MANY, |out| self.bind(out), |_| Ok(()))
    }
}

impl InsertEvents<'_> {
    fn bind<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        for ids in [&self.user_ids, &self.event_ids] {
            out.push_sql(NEXT_COLUMN);
            out.push_bind_param::<Array<SqlUuid>, _>(ids)?;
        }
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Timestamptz>, _>(&self.occurred_at)?;
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Text>, _>(&self.models)?;
        for counts in [
            &self.input,
            &self.output,
            &self.cached_input,
            &self.cache_write,
            &self.reasoning,
        ] {
            out.push_sql(NEXT_COLUMN);
            out.push_bind_param::<Array<BigInt>, _>(counts)?;
        }
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Text>, _>(&self.request_ids)?;
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Jsonb>, _>(&self.labels)
    }
}

/// As [`InsertEvents`], for one: without arrays, groups and sorting it costs Postgres two thirds.
struct InsertEvent<'a> {
    month: String,
    event: &'a UsageEvent,
    labels: LabelsJson<'a>,
}

impl<'a> InsertEvent<'a> {
    fn new(event: &'a UsageEvent) -> Self {
        Self {
            month: event.period().to_string(),
            labels: LabelsJson(&event.labels),
            event,
        }
    }
}

impl QueryFragment<Pg> for InsertEvent<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let event = self.event;
        walk_insert(
            out,
            &ONE,
            |out| {
                out.push_bind_param::<Text, _>(&self.month)?;
                for id in [&event.user_id.0, &event.event_id.0] {
                    out.push_sql(", ");
                    out.push_bind_param::<SqlUuid, _>(id)?;
                }
                out.push_sql(", ");
                out.push_bind_param::<Timestamptz, _>(&event.occurred_at)?;
                out.push_sql(", ");
                out.push_bind_param::<Text, _>(event.model.as_str())?;
                for count in [
                    &event.tokens.input,
                    &event.tokens.output,
                    &event.tokens.cached_input,
                    &event.tokens.cache_write,
                    &event.tokens.reasoning,
                ] {
                    out.push_sql(", ");
                    out.push_bind_param::<BigInt, _>(count)?;
                }
                out.push_sql(", ");
                out.push_bind_param::<Text, _>(&event.request_id)?;
                out.push_sql(", ");
                out.push_bind_param::<Jsonb, _>(&self.labels)
            },
            |_| Ok(()),
        )
    }
}

prepared! {
    InsertEvent<'a> => () = InsertEvent<'static>;
}

/// Labels that are written as they are, without a copy of them between.
#[derive(Debug)]
struct LabelsJson<'a>(&'a Labels);

impl ToSql<Jsonb, Pg> for LabelsJson<'_> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        // The version of the format.
        out.write_all(&[1])?;
        serde_json::to_writer(out, self.0)?;
        Ok(IsNull::No)
    }
}

/// In what the statements for one event and for many differ.
struct Shape {
    /// Before the values; they end with a parenthesis.
    values: &'static str,
    /// Before and behind the statement that adds.
    adding: [&'static str; 2],
    /// What an event, or all of a group, adds to a month of a model.
    sums: &'static str,
    groups: &'static str,
    /// The places of those that were there; of one, how many sums it was added to says as much. Parameters
    /// are named by their numbers: they are bound.
    known: &'static str,
}

const ONE: Shape = Shape {
    values: "VALUES (",
    adding: ["", ""],
    sums: "input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, 1",
    groups: "",
    known: "",
};

const MANY: Shape = Shape {
    values: "SELECT unnest(",
    adding: [", sums AS (", ")"],
    sums: "sum_bigint(input_tokens), sum_bigint(output_tokens),
                    sum_bigint(cached_input_tokens), sum_bigint(cache_write_tokens),
                    sum_bigint(reasoning_tokens), count(*)",
    groups: "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
    known: "SELECT place
            FROM unnest($1, $2, $3) WITH ORDINALITY AS sent (usage_month, user_id, event_id, place)
            WHERE (SELECT count(*) FROM new) < cardinality($1)
                AND NOT EXISTS (SELECT FROM new WHERE new.event_id = sent.event_id
                    AND new.user_id = sent.user_id AND new.usage_month = sent.usage_month)",
};

/// Of many: side by side in a list of columns arrays are read as they are, where `FROM` would copy
/// each to a store of its own first.
const NEXT_COLUMN: &str = "), unnest(";

fn walk_insert<'b>(
    mut out: AstPass<'_, 'b, Pg>,
    shape: &Shape,
    bind: impl FnOnce(&mut AstPass<'_, 'b, Pg>) -> QueryResult<()>,
    settle: impl FnOnce(&mut AstPass<'_, 'b, Pg>) -> QueryResult<()>,
) -> QueryResult<()> {
    out.push_sql(
        "WITH new AS (
                INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_id, labels)
                ",
    );
    out.push_sql(shape.values);
    bind(&mut out)?;
    out.push_sql(
        ")
                ON CONFLICT DO NOTHING
                RETURNING usage_month, user_id, event_id, model, input_tokens, output_tokens,
                    cached_input_tokens, cache_write_tokens, reasoning_tokens
            )",
    );
    let [before, behind] = shape.adding;
    out.push_sql(before);
    out.push_sql(
        "
                INSERT INTO monthly_model_usage AS m (user_id, month, model,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_count)
                SELECT user_id, usage_month, model, ",
    );
    for sql in [shape.sums, " FROM new ", shape.groups] {
        out.push_sql(sql);
    }
    out.push_sql(
        "
                ON CONFLICT (user_id, month, model) DO UPDATE SET
                    input_tokens = m.input_tokens + EXCLUDED.input_tokens,
                    output_tokens = m.output_tokens + EXCLUDED.output_tokens,
                    cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
                    cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
                    reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
                    request_count = m.request_count + EXCLUDED.request_count
            ",
    );
    out.push_sql(behind);
    settle(&mut out)?;
    out.push_sql("\n            ");
    out.push_sql(shape.known);
    Ok(())
}

prepared! {
    InsertEvents<'a> => BigInt = InsertEvents<'static>;
}

/// Holds of other replicas that events settle, by their names.
#[derive(Default)]
struct Settlements {
    owners: Vec<Uuid>,
    holds: Vec<i64>,
    months: Vec<String>,
    user_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
}

impl Settlements {
    fn of(bookings: &[&Booking]) -> Self {
        let mut all = Self::default();
        for booking in bookings {
            let Some(name) = booking.settles() else {
                continue;
            };
            let (month, user_id, event_id) = key_of(&booking.event);
            all.owners.push(name.owner.0);
            all.holds.push(name.hold.0.cast_signed());
            all.months.push(month.to_string());
            all.user_ids.push(user_id);
            all.event_ids.push(event_id);
        }
        all
    }

    fn is_empty(&self) -> bool {
        self.holds.is_empty()
    }

    fn walk<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            ", settled AS (
                INSERT INTO quota_settlements (replica_id, hold_id, kind, tokens)
                SELECT s.replica_id, s.hold_id, 'committed', coalesce(new.input_tokens
                    + new.output_tokens + new.cached_input_tokens + new.cache_write_tokens
                    + new.reasoning_tokens, 0)
                FROM unnest(",
        );
        out.push_bind_param::<Array<SqlUuid>, _>(&self.owners)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<BigInt>, _>(&self.holds)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        for ids in [&self.user_ids, &self.event_ids] {
            out.push_sql(", ");
            out.push_bind_param::<Array<SqlUuid>, _>(ids)?;
        }
        out.push_sql(
            ") AS s (replica_id, hold_id, usage_month, user_id, event_id)
                LEFT JOIN new USING (usage_month, user_id, event_id)
                ORDER BY 1, 2
                ON CONFLICT DO NOTHING
            )",
        );
        Ok(())
    }
}

/// As [`InsertEvents`], and tells the owners of holds what was charged.
struct InsertAndSettle<'a> {
    events: InsertEvents<'a>,
    settlements: Settlements,
}

impl QueryFragment<Pg> for InsertAndSettle<'_> {
    fn walk_ast<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let (events, settlements) = (&self.events, &self.settlements);
        walk_insert(
            out,
            &MANY,
            |out| events.bind(out),
            |out| settlements.walk(out),
        )
    }
}

prepared! {
    InsertAndSettle<'a> => BigInt = InsertAndSettle<'static>;
}
