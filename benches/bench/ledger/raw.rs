//! Postgres without a service before it: one connection, one statement, many rows.

use std::{error::Error as StdError, pin::pin};

use anyhow::ensure;
use bytes::BytesMut;
use tokio_postgres::{
    Client, NoTls, Statement,
    binary_copy::BinaryCopyInWriter,
    types::{IsNull, ToSql, Type, to_sql_checked},
};
use tollkeeper::model::Period;
use uuid::Uuid;

use super::events::{Event, LABEL};

/// The statement of `src/store/ledger/statements.rs`, as one would write it first.
const BOOK: &str = "
    WITH new AS (
        INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
            input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
            reasoning_tokens, request_id, labels)
        SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
        ON CONFLICT DO NOTHING
        RETURNING *
    ), by_model AS (
        INSERT INTO monthly_model_usage AS m (user_id, month, model,
            input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
            reasoning_tokens, request_count)
        SELECT user_id, usage_month, model,
            sum(input_tokens), sum(output_tokens), sum(cached_input_tokens),
            sum(cache_write_tokens), sum(reasoning_tokens), count(*)
        FROM new GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
        ON CONFLICT (user_id, month, model) DO UPDATE SET
            input_tokens = m.input_tokens + EXCLUDED.input_tokens,
            output_tokens = m.output_tokens + EXCLUDED.output_tokens,
            cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
            cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
            reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
            request_count = m.request_count + EXCLUDED.request_count,
            room = ''
    )
    SELECT usage_month, user_id, event_id FROM new";

/// The same for one event, without arrays, groups and sorting.
const BOOK_ONE: &str = "
    WITH new AS (
        INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
            input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
            reasoning_tokens, request_id, labels)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
        ON CONFLICT DO NOTHING
        RETURNING *
    )
    INSERT INTO monthly_model_usage AS m (user_id, month, model,
        input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
        reasoning_tokens, request_count)
    SELECT user_id, usage_month, model, input_tokens, output_tokens, cached_input_tokens,
        cache_write_tokens, reasoning_tokens, 1
    FROM new
    ON CONFLICT (user_id, month, model) DO UPDATE SET
        input_tokens = m.input_tokens + EXCLUDED.input_tokens,
        output_tokens = m.output_tokens + EXCLUDED.output_tokens,
        cached_input_tokens = m.cached_input_tokens + EXCLUDED.cached_input_tokens,
        cache_write_tokens = m.cache_write_tokens + EXCLUDED.cache_write_tokens,
        reasoning_tokens = m.reasoning_tokens + EXCLUDED.reasoning_tokens,
        request_count = m.request_count + EXCLUDED.request_count,
        room = ''";

const BOOK_TYPES: [Type; 12] = [
    Type::TEXT_ARRAY,
    Type::UUID_ARRAY,
    Type::UUID_ARRAY,
    Type::TIMESTAMPTZ_ARRAY,
    Type::TEXT_ARRAY,
    Type::INT8_ARRAY,
    Type::INT8_ARRAY,
    Type::INT8_ARRAY,
    Type::INT8_ARRAY,
    Type::INT8_ARRAY,
    Type::TEXT_ARRAY,
    Type::JSONB_ARRAY,
];

/// What COPY fills.
pub(crate) const STAGING: &str = "CREATE TABLE staged (LIKE usage_records INCLUDING DEFAULTS)";
const COPY: &str = "
    COPY staged (usage_month, user_id, event_id, occurred_at, model, input_tokens, output_tokens,
        cached_input_tokens, cache_write_tokens, reasoning_tokens, request_id, labels)
    FROM STDIN (FORMAT binary)";
const ROW_TYPES: [Type; 12] = [
    Type::TEXT,
    Type::UUID,
    Type::UUID,
    Type::TIMESTAMPTZ,
    Type::TEXT,
    Type::INT8,
    Type::INT8,
    Type::INT8,
    Type::INT8,
    Type::INT8,
    Type::TEXT,
    Type::JSONB,
];

/// Has the sums as they are once each was added to: without the bytes that the first time takes away, and
/// with the room of those in their pages. A few of each page at a time, as life does.
pub(crate) const SUMS_IN_USE: &str = "
    DO $$ BEGIN
        FOR step IN 0..15 LOOP
            UPDATE monthly_model_usage SET room = ''
            WHERE room <> '' AND (step > 9 OR (ctid::text::point)[1]::int % 10 = step);
            COMMIT;
        END LOOP;
    END $$";

type Row<'a> = [&'a (dyn ToSql + Sync); 12];

/// The columns of an event. A macro, for what it borrows lives where it is used.
macro_rules! row {
    ($event:expr) => {
        [
            &month($event),
            &Bytes16($event.user),
            &Bytes16($event.id),
            &time($event),
            &$event.model,
            &$event.input,
            &$event.output,
            &$event.cached_input,
            &0_i64,
            &0_i64,
            &$event.request_id,
            &Labels,
        ]
    };
}

/// A connection with its statements prepared and, as the service's, planned once.
pub(crate) struct Connection {
    client: Client,
    book: Statement,
    book_one: Statement,
}

impl Connection {
    pub(crate) async fn open(database_url: &str) -> anyhow::Result<Self> {
        let (client, connection) = tokio_postgres::connect(database_url, NoTls).await?;
        tokio::spawn(connection);
        let plan_once = "SET plan_cache_mode = force_generic_plan";
        client.batch_execute(plan_once).await?;
        Ok(Self {
            book: client.prepare_typed(BOOK, &BOOK_TYPES).await?,
            book_one: client.prepare_typed(BOOK_ONE, &ROW_TYPES).await?,
            client,
        })
    }

    /// Books new events in one transaction, in the order of their keys as the service does.
    pub(crate) async fn book(&self, mut events: Vec<Event>) -> anyhow::Result<()> {
        events.sort_by_key(|event| (event.user, event.id));
        let months: Vec<_> = events.iter().map(month).collect();
        let users: Vec<_> = events.iter().map(|event| Bytes16(event.user)).collect();
        let ids: Vec<_> = events.iter().map(|event| Bytes16(event.id)).collect();
        let times: Vec<_> = events.iter().map(time).collect();
        let models: Vec<_> = events.iter().map(|event| event.model).collect();
        let input: Vec<_> = events.iter().map(|event| event.input).collect();
        let output: Vec<_> = events.iter().map(|event| event.output).collect();
        let cached: Vec<_> = events.iter().map(|event| event.cached_input).collect();
        let none = vec![0_i64; events.len()];
        let requests: Vec<_> = events.iter().map(|event| &*event.request_id).collect();
        let labels: Vec<_> = events.iter().map(|_| Labels).collect();
        let params: [&(dyn ToSql + Sync); 12] = [
            &months, &users, &ids, &times, &models, &input, &output, &cached, &none, &none,
            &requests, &labels,
        ];
        let rows = self.client.query(&self.book, &params).await?;
        ensure!(rows.len() == events.len(), "some were booked before");
        Ok(())
    }

    /// Books a new event in a transaction of its own.
    pub(crate) async fn book_one(&self, event: &Event) -> anyhow::Result<()> {
        let row: Row = row!(event);
        let booked = self.client.execute(&self.book_one, &row).await?;
        ensure!(booked == 1, "it was booked before");
        Ok(())
    }

    /// Copies events into the staging table in one transaction, and does no more with them.
    pub(crate) async fn copy(&self, events: &[Event]) -> anyhow::Result<()> {
        let writer = BinaryCopyInWriter::new(self.client.copy_in(COPY).await?, &ROW_TYPES);
        let mut writer = pin!(writer);
        for event in events {
            let row: Row = row!(event);
            writer.as_mut().write(&row).await?;
        }
        let copied = writer.finish().await?;
        ensure!(copied == events.len() as u64, "not all were copied");
        Ok(())
    }
}

fn month(event: &Event) -> String {
    Period::containing(event.occurred_at).to_string()
}

fn time(event: &Event) -> std::time::SystemTime {
    event.occurred_at.into()
}

/// A UUID; the driver's own conversion is a feature that the product does not build.
#[derive(Debug)]
struct Bytes16(Uuid);

impl ToSql for Bytes16 {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::UUID
    }

    to_sql_checked!();
}

/// The labels of every event, as `jsonb`.
#[derive(Debug)]
struct Labels;

impl ToSql for Labels {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        let (key, value) = LABEL;
        // The version of the format, and JSON.
        out.extend_from_slice(format!("\x01{{\"{key}\":\"{value}\"}}").as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }

    to_sql_checked!();
}
