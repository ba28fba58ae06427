//! The statements that book events and add them to the sums, each in one transaction.
//!
//! All take locks in one order, so that concurrent batches never wait for each other in a circle: events
//! by their keys, then sums by theirs, as bytes.

use std::io::Write as _;

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    serialize::{self, IsNull, Output, ToSql},
    sql_types::{Array, BigInt, Jsonb, Text, Timestamptz, Uuid as SqlUuid},
};
use uuid::Uuid;

use super::{super::prepared::prepared, key_of};
use crate::model::{Booking, Labels, Period, UsageEvent};

/// Inserts events that are not there yet and adds just those to the sums; returns the places, from 1
/// on, of the others, which are seldom any.
///
/// A fragment of its own with a static id: diesel would prepare an upsert anew on every call.
pub(super) struct InsertEvents<'a> {
    months: Vec<Month>,
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
    pub(super) fn new(events: &[&'a UsageEvent]) -> Self {
        let column =
            |value: fn(&UsageEvent) -> i64| events.iter().map(|event| value(event)).collect();
        Self {
            months: events.iter().map(|event| Month(event.period())).collect(),
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
    pub(super) fn bind<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.bind_but_labels(out)?;
        out.push_sql(NEXT_COLUMN);
        out.push_bind_param::<Array<Jsonb>, _>(&self.labels)
    }

    pub(super) fn bind_but_labels<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
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
        out.push_bind_param::<Array<Text>, _>(&self.request_ids)
    }
}

/// As [`InsertEvents`], for one: without arrays, groups and sorting it costs Postgres two thirds.
pub(super) struct InsertEvent<'a> {
    month: Month,
    event: &'a UsageEvent,
    labels: LabelsJson<'a>,
}

impl<'a> InsertEvent<'a> {
    pub(super) fn new(event: &'a UsageEvent) -> Self {
        Self {
            month: Month(event.period()),
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

/// A month as columns have it, `YYYY-MM`, written without a text of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Month(pub(super) Period);

impl ToSql<Text, Pg> for Month {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        write!(out, "{}", self.0)?;
        Ok(IsNull::No)
    }
}

/// Labels that are written as they are, without a copy of them between.
#[derive(Debug)]
pub(super) struct LabelsJson<'a>(pub(super) &'a Labels);

impl ToSql<Jsonb, Pg> for LabelsJson<'_> {
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, Pg>) -> serialize::Result {
        // The version of the format.
        out.write_all(&[1])?;
        serde_json::to_writer(out, self.0)?;
        Ok(IsNull::No)
    }
}

/// Begins what inserts events.
pub(super) const NEW_RECORDS: &str = "WITH new AS (
                INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_id, labels)
                ";

/// Begins what adds to the sums.
pub(super) const TO_SUMS: &str = "
                INSERT INTO monthly_model_usage AS m (user_id, month, model,
                    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, request_count)
                ";

/// Ends it.
pub(super) const ADDED: &str = "
                ON CONFLICT (user_id, month, model) DO UPDATE SET
                    input_tokens = m.input_tokens + EXCLUDED.input_tokens,
                    output_tokens = m.output_tokens + EXCLUDED.output_tokens,
                    cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
                    cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
                    reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
                    request_count = m.request_count + EXCLUDED.request_count,
                    room = ''
            ";

/// In what the statements for one event and for many differ.
struct Shape {
    /// Before the values; they end with a parenthesis.
    values: &'static str,
    /// Before and behind the statement that adds.
    adding: [&'static str; 2],
    /// The model, and what an event, or all of a group, adds to a month of it.
    sums: &'static str,
    groups: &'static str,
    /// The places of those that were there; of one, how many sums it was added to says as much. Parameters
    /// are named by their numbers: they are bound.
    known: &'static str,
}

const ONE: Shape = Shape {
    values: "VALUES (",
    adding: ["", ""],
    sums: "model, input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
                    reasoning_tokens, 1",
    groups: "",
    known: "",
};

const MANY: Shape = Shape {
    values: "SELECT unnest(",
    adding: [", sums AS (", ")"],
    sums: "model COLLATE \"C\", sum_bigint(input_tokens), sum_bigint(output_tokens),
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
pub(super) const NEXT_COLUMN: &str = "), unnest(";

fn walk_insert<'b>(
    mut out: AstPass<'_, 'b, Pg>,
    shape: &Shape,
    bind: impl FnOnce(&mut AstPass<'_, 'b, Pg>) -> QueryResult<()>,
    settle: impl FnOnce(&mut AstPass<'_, 'b, Pg>) -> QueryResult<()>,
) -> QueryResult<()> {
    out.push_sql(NEW_RECORDS);
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
    out.push_sql(TO_SUMS);
    out.push_sql("SELECT user_id, usage_month, ");
    for sql in [shape.sums, " FROM new ", shape.groups, ADDED, behind] {
        out.push_sql(sql);
    }
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
pub(super) struct Settlements {
    owners: Vec<Uuid>,
    holds: Vec<i64>,
    months: Vec<Month>,
    user_ids: Vec<Uuid>,
    event_ids: Vec<Uuid>,
}

impl Settlements {
    pub(super) fn of(bookings: &[&Booking]) -> Self {
        let mut all = Self::default();
        for booking in bookings {
            let Some(name) = booking.settles() else {
                continue;
            };
            let (month, user_id, event_id) = key_of(&booking.event);
            all.owners.push(name.owner.0);
            all.holds.push(name.hold.0.cast_signed());
            all.months.push(Month(month));
            all.user_ids.push(user_id);
            all.event_ids.push(event_id);
        }
        all
    }

    pub(super) fn is_empty(&self) -> bool {
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
pub(super) struct InsertAndSettle<'a> {
    pub(super) events: InsertEvents<'a>,
    pub(super) settlements: Settlements,
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
