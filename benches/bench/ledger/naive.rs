//! `RecordUsage` as one would write it first: tonic on its default runtime, a pool of 16 connections,
//! one transaction for each call.
//!
//! What it leaves out is in its favour: it asks nobody who calls, looks for no user, checks no bounds,
//! compares no replay and keeps one total for each user and month, without models. Its statements are prepared once and its pool tests no connection, so a
//! call is four round trips (BEGIN, the event, the month, COMMIT) or, in its other shape, one.

use chrono::{DateTime, Utc};
use clap::ValueEnum;
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, QueryFragment, QueryId},
    result::Error as DieselError,
    sql_types::{BigInt, Jsonb, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{
    AsyncConnection as _, AsyncPgConnection, RunQueryDsl, pooled_connection::deadpool::Pool,
};
use serde_json::Value;
use tollkeeper::{
    model::Period,
    proto::tollkeeper::usage::v1::{
        RecordUsageRequest, RecordUsageResponse, UsageEvent, record_usage_response::Outcome,
    },
};
use tonic::{Request, Response, Status, codegen::BoxFuture, server::UnaryService};
use uuid::Uuid;

use super::events::RECORD_USAGE;
use crate::naive;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shape {
    /// Four round trips
    Naive,
    /// One statement
    Single,
}

impl Shape {
    pub(crate) fn as_arg(self) -> &'static str {
        match self {
            Self::Naive => "naive",
            Self::Single => "single",
        }
    }
}

pub(crate) fn serve(shape: Shape, database_url: &str) -> anyhow::Result<()> {
    naive::serve(RECORD_USAGE, async || {
        let pool = naive::pool(database_url)?;
        Ok(Naive { pool, shape })
    })
}

#[derive(Clone)]
struct Naive {
    pool: Pool<AsyncPgConnection>,
    shape: Shape,
}

impl Naive {
    async fn record(&self, event: &Row) -> anyhow::Result<Outcome> {
        let mut conn = self.pool.get().await?;
        let inserted = match self.shape {
            Shape::Naive => {
                conn.transaction::<_, DieselError, _>(async |conn| {
                    let inserted = InsertEvent(event).execute(conn).await?;
                    if inserted > 0 {
                        AddToMonth(event).execute(conn).await?;
                    }
                    Ok(inserted)
                })
                .await?
            }
            Shape::Single => InsertAndAdd(event).execute(&mut conn).await?,
        };
        Ok(match inserted {
            0 => Outcome::Duplicate,
            _ => Outcome::Recorded,
        })
    }
}

impl UnaryService<RecordUsageRequest> for Naive {
    type Response = RecordUsageResponse;
    type Future = BoxFuture<Response<Self::Response>, Status>;

    fn call(&mut self, request: Request<RecordUsageRequest>) -> Self::Future {
        let naive = self.clone();
        Box::pin(async move {
            let event = request.into_inner().event.and_then(Row::read);
            let event = event.ok_or_else(|| Status::invalid_argument("not an event"))?;
            let outcome = naive.record(&event).await.map_err(|error| {
                eprintln!("==> the naive server: {error:#}");
                Status::unavailable("")
            })?;
            Ok(Response::new(RecordUsageResponse {
                outcome: outcome.into(),
            }))
        })
    }
}

/// An event as it goes into the database.
struct Row {
    month: String,
    user_id: Uuid,
    event_id: Uuid,
    occurred_at: DateTime<Utc>,
    model: String,
    tokens: [i64; 5],
    request_id: String,
    labels: Value,
}

impl Row {
    fn read(event: UsageEvent) -> Option<Self> {
        let at = event.occurred_at?;
        let occurred_at = DateTime::from_timestamp(at.seconds, u32::try_from(at.nanos).ok()?)?;
        let tokens = event.tokens?;
        Some(Self {
            month: Period::containing(occurred_at).to_string(),
            user_id: event.user_id.parse().ok()?,
            event_id: event.event_id.parse().ok()?,
            occurred_at,
            model: event.model,
            tokens: [
                tokens.input,
                tokens.output,
                tokens.cached_input,
                tokens.cache_write,
                tokens.reasoning,
            ],
            request_id: event.request_id,
            labels: event.labels.into_iter().collect(),
        })
    }

    /// Pushes the columns in their order in the table.
    fn push<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_bind_param::<Text, _>(&self.month)?;
        for id in [&self.user_id, &self.event_id] {
            out.push_sql(", ");
            out.push_bind_param::<SqlUuid, _>(id)?;
        }
        out.push_sql(", ");
        out.push_bind_param::<Timestamptz, _>(&self.occurred_at)?;
        out.push_sql(", ");
        out.push_bind_param::<Text, _>(&self.model)?;
        for count in &self.tokens {
            out.push_sql(", ");
            out.push_bind_param::<BigInt, _>(count)?;
        }
        out.push_sql(", ");
        out.push_bind_param::<Text, _>(&self.request_id)?;
        out.push_sql(", ");
        out.push_bind_param::<Jsonb, _>(&self.labels)
    }
}

const INSERT: &str =
    "INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
    input_tokens, output_tokens, cached_input_tokens, cache_write_tokens, reasoning_tokens,
    request_id, labels) VALUES (";

/// Its sums, one row for each user and month; everybody has used something.
pub(crate) const MONTHS: &str = "
    CREATE TABLE naive_months (
        user_id uuid, month text COLLATE \"C\", input_tokens bigint NOT NULL,
        output_tokens bigint NOT NULL, cached_input_tokens bigint NOT NULL,
        cache_write_tokens bigint NOT NULL, reasoning_tokens bigint NOT NULL,
        request_count bigint NOT NULL, PRIMARY KEY (user_id, month)
    ) WITH (fillfactor = 70);
    INSERT INTO naive_months
    SELECT id, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), 0, 0, 0, 0, 0, 0 FROM users";

/// Adds the row of `new` to its month.
const ADD: &str = "INSERT INTO naive_months AS m (user_id, month, input_tokens, output_tokens,
        cached_input_tokens, cache_write_tokens, reasoning_tokens, request_count)
    SELECT user_id, usage_month, input_tokens, output_tokens, cached_input_tokens,
        cache_write_tokens, reasoning_tokens, 1 FROM new
    ON CONFLICT (user_id, month) DO UPDATE SET
        input_tokens = m.input_tokens + EXCLUDED.input_tokens,
        output_tokens = m.output_tokens + EXCLUDED.output_tokens,
        cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
        cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
        reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
        request_count = m.request_count + 1";

/// The event.
struct InsertEvent<'a>(&'a Row);

impl QueryFragment<Pg> for InsertEvent<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(INSERT);
        self.0.push(&mut out)?;
        out.push_sql(") ON CONFLICT DO NOTHING");
        Ok(())
    }
}

/// Its month.
struct AddToMonth<'a>(&'a Row);

impl QueryFragment<Pg> for AddToMonth<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "WITH new (usage_month, user_id, event_id, occurred_at, model, input_tokens,
                 output_tokens, cached_input_tokens, cache_write_tokens, reasoning_tokens,
                 request_id, labels) AS (VALUES (",
        );
        self.0.push(&mut out)?;
        out.push_sql(")) ");
        out.push_sql(ADD);
        Ok(())
    }
}

/// The event and, if it is new, its month.
struct InsertAndAdd<'a>(&'a Row);

impl QueryFragment<Pg> for InsertAndAdd<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("WITH new AS (");
        out.push_sql(INSERT);
        self.0.push(&mut out)?;
        out.push_sql(") ON CONFLICT DO NOTHING RETURNING *) ");
        out.push_sql(ADD);
        Ok(())
    }
}

impl QueryId for InsertEvent<'_> {
    type QueryId = InsertEvent<'static>;
    const HAS_STATIC_QUERY_ID: bool = true;
}

impl QueryId for AddToMonth<'_> {
    type QueryId = AddToMonth<'static>;
    const HAS_STATIC_QUERY_ID: bool = true;
}

impl QueryId for InsertAndAdd<'_> {
    type QueryId = InsertAndAdd<'static>;
    const HAS_STATIC_QUERY_ID: bool = true;
}
