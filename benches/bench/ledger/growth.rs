//! Whether what is there already makes what comes slower.
//!
//! A database for each size, all on one Postgres and each with the service on it, so that they take
//! turns too. Events are of two months and of everybody; they are filled without indexes, which are
//! built at the end as a restored dump does. Sums are made of the events.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use chrono::{DateTime, Utc};
use futures_util::future::try_join_all;
use nix::sys::statvfs::statvfs;
use prost::Message as _;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls};
use tollkeeper::{model::Period, proto::tollkeeper::usage::v1::GetMonthlyUsageRequest};
use tonic::Code;

use crate::{
    fixture::Fixture,
    load::{self, Calls, InFlight, Slice, Until},
    process::{Postgres, Server},
    report::{Chart, Panel, Row},
};

use super::{
    CONNECTIONS, Comparison, Plan,
    events::{Events, LABEL, MODELS, Users},
    raw, watch_postgres,
};

const GET_MONTHLY_USAGE: &str = "/tollkeeper.usage.v1.UsageService/GetMonthlyUsage";
const READS_IN_FLIGHT: usize = 32;
const WRITES_IN_FLIGHT: [usize; 2] = [1024, 16];

const RAW_EVENTS: usize = 100;
const RAW_CONNECTIONS: usize = 2;

/// A turn of writing is so many times as long as others, and the first, which is not counted, so many
/// times as long again: after a checkpoint each page is written in full once, which is a small part
/// of what is written until the next.
const LONGER: u32 = 3;
const FIRST_LONGER: u32 = 5;

/// Up to so many, events are put back to their number before each turn. Of more, what a turn adds is
/// a small part.
const RESET_AT_MOST: u64 = 2_000_000;

/// Events filled by one statement.
const CHUNK: u64 = 1_000_000;

/// On the disk, of an event with its indexes; and of what else Postgres writes meanwhile.
const EVENT_BYTES: u64 = 500;
const OTHER_BYTES: u64 = 12 << 30;

pub(super) fn compare(
    plan: &Plan,
    fixture: &Fixture,
    runtime: &Runtime,
) -> anyhow::Result<Comparison> {
    let folder = fixture.folder();
    let disk = statvfs(folder)?;
    let free = disk.blocks_available() as u64 * disk.fragment_size() as u64;
    let wanted = plan.existing.iter().sum::<u64>() * EVENT_BYTES + OTHER_BYTES;
    ensure!(
        wanted < free,
        "{} needs {} GB for this, and has {}: make --existing smaller",
        folder.display(),
        wanted >> 30,
        free >> 30
    );
    let mut sizes = Vec::new();
    for &events in &plan.existing {
        sizes.push(Grown::make(events, fixture, runtime)?);
    }
    let postgres = fixture.postgres()?;
    let mut panels = Vec::new();
    for in_flight in WRITES_IN_FLIGHT {
        panels.push(writes(plan, &sizes, in_flight, postgres, runtime)?);
        if panels.len() == 1 {
            panels.push(raw_writes(plan, &sizes, postgres, runtime)?);
        }
    }
    for size in &sizes {
        runtime.block_on(size.settle())?;
    }
    panels.push(reads(plan, fixture, &sizes, postgres)?);
    Ok(Comparison {
        part: "growth",
        chart: Chart {
            title: "RecordUsage and GetMonthlyUsage beside the events that are there already",
            base: NAMES[0],
            base_title: "the smallest ledger",
            cpu_of: "service and Postgres per call",
            unit: "calls",
            grey: &NAMES[..1],
        },
        panels,
    })
}

/// Of the rows, by size.
const NAMES: [&str; 4] = ["first", "second", "third", "fourth"];

fn rows(sizes: &[Grown]) -> Vec<Row> {
    let rows = NAMES.into_iter().zip(sizes);
    rows.map(|(name, size)| Row::new(name, format!("beside {} events", size.events)))
        .collect()
}

fn writes(
    plan: &Plan,
    sizes: &[Grown],
    in_flight: usize,
    postgres: Postgres,
    runtime: &Runtime,
) -> anyhow::Result<Panel> {
    let title = format!("RecordUsage, {in_flight} in flight");
    for size in sizes {
        runtime.block_on(size.settle())?;
    }
    let time = plan.options.slice() * LONGER;
    let turn = |size: &Grown, first: bool| {
        runtime.block_on(size.reset())?;
        let time = if first { time * FIRST_LONGER } else { time };
        let until = Until::time(time);
        size.turn(&size.records, in_flight, until, plan, postgres)
    };
    take_turns(title, plan, sizes, turn)
}

/// What Postgres alone loses, with as large batches as calls in a crowd become.
fn raw_writes(
    plan: &Plan,
    sizes: &[Grown],
    postgres: Postgres,
    runtime: &Runtime,
) -> anyhow::Result<Panel> {
    let title = format!(
        "the statement without a service, {RAW_EVENTS} events on each of {RAW_CONNECTIONS} connections"
    );
    let time = plan.options.slice() * LONGER;
    take_turns(title, plan, sizes, |size, _| {
        runtime.block_on(size.reset())?;
        watch_postgres(postgres, || runtime.block_on(size.write_raw(time)))
    })
}

fn reads(
    plan: &Plan,
    fixture: &Fixture,
    sizes: &[Grown],
    postgres: Postgres,
) -> anyhow::Result<Panel> {
    let messages = fixture.people.iter().map(|person| {
        let user_id = person.user.to_string();
        let month = String::new();
        GetMonthlyUsageRequest { user_id, month }.encode_to_vec()
    });
    let caller = Some(fixture.service_key.as_str());
    let calls = Calls::new(GET_MONTHLY_USAGE, caller, messages, Code::Ok).drawn_at_random();
    let title = format!("GetMonthlyUsage, {READS_IN_FLIGHT} in flight");
    let time = plan.options.slice();
    take_turns(title, plan, sizes, |size, first| {
        // What is read lies on the disk until it has been read.
        let time = if first { time * FIRST_LONGER } else { time };
        let until = Until::time(time);
        size.turn(&calls, READS_IN_FLIGHT, until, plan, postgres)
    })
}

fn take_turns(
    title: String,
    plan: &Plan,
    sizes: &[Grown],
    turn: impl Fn(&Grown, bool) -> anyhow::Result<Slice>,
) -> anyhow::Result<Panel> {
    eprintln!("==> {title}");
    let mut rows = rows(sizes);
    for size in sizes {
        turn(size, true)?;
    }
    for round in 0..plan.options.rounds() {
        for step in 0..rows.len() {
            let index = (step + round) % rows.len();
            rows[index].rounds.push(turn(&sizes[index], false)?);
        }
    }
    Ok(Panel { title, rows })
}

/// A database with events, and the service on it.
struct Grown {
    events: u64,
    client: Client,
    parts: [Part; 2],
    server: Server,
    records: Calls,
    fresh: Events,
    raw: Vec<raw::Connection>,
}

/// The events of a month.
#[derive(Clone, Copy)]
struct Part {
    month: Period,
    events: u64,
    begin: DateTime<Utc>,
    end: DateTime<Utc>,
}

impl Grown {
    fn make(events: u64, fixture: &Fixture, runtime: &Runtime) -> anyhow::Result<Self> {
        eprintln!("==> filling a database with {events} events");
        let now = Utc::now();
        let month = Period::containing(now);
        let (begin, middle) = (month.previous().start(), month.start());
        let share = (middle - begin).as_seconds_f64() / (now - begin).as_seconds_f64();
        let before = (events as f64 * share) as u64;
        let parts = [
            Part {
                month: month.previous(),
                events: before,
                begin,
                end: middle,
            },
            Part {
                month,
                events: events - before,
                begin: middle,
                end: now,
            },
        ];
        let name = format!("with_{events}");
        let (postgres, template) = fixture.database_url().rsplit_once('/').context("a URL")?;
        let url = format!("{postgres}/{name}");
        let client = runtime.block_on(async {
            let make = format!("CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy");
            let elsewhere = connect(&format!("{postgres}/postgres")).await?;
            elsewhere.batch_execute(&make).await?;
            let client = connect(&url).await?;
            fill(&client, &parts).await?;
            let count = "SELECT count(*) FROM usage_records";
            let filled: i64 = client.query_one(count, &[]).await?.try_get(0)?;
            ensure!(u64::try_from(filled)? == events, "{filled} were filled");
            client.batch_execute(&add_to_sums()).await?;
            client.batch_execute(raw::SUMS_IN_USE).await?;
            client.batch_execute("VACUUM ANALYZE").await?;
            anyhow::Ok(client)
        })?;
        let server = fixture.serve(&name, &[("DATABASE_URL", &url)])?;
        let people = fixture.people.iter().map(|person| person.user).collect();
        let key = &fixture.service_key;
        // Everybody is read once.
        let warm_up = Events::of(&people, Users::InTurn).calls(key);
        let until = Until {
            time: Duration::from_secs(120),
            calls: people.len(),
        };
        load::run(&server, &warm_up, InFlight::new(512, CONNECTIONS), 1, until)?;
        let connect = || try_join_all((0..RAW_CONNECTIONS).map(|_| raw::Connection::open(&url)));
        let fresh = Events::of(&people, Users::Uniform);
        Ok(Self {
            events,
            client,
            parts,
            server,
            records: fresh.calls(key),
            fresh,
            raw: runtime.block_on(async { connect().await })?,
        })
    }

    /// Begins a turn: the number of events is right.
    async fn reset(&self) -> anyhow::Result<()> {
        if self.events <= RESET_AT_MOST {
            fill(&self.client, &self.parts).await?;
            self.client
                .batch_execute("VACUUM ANALYZE usage_records")
                .await?;
        }
        Ok(())
    }

    /// Leaves nothing of the writing that has been to be done later.
    async fn settle(&self) -> anyhow::Result<()> {
        for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
            self.client.batch_execute(statement).await?;
        }
        Ok(())
    }

    async fn write_raw(&self, time: Duration) -> anyhow::Result<Slice> {
        let begun = Instant::now();
        let write = async |connection: &raw::Connection| {
            let mut latencies = Vec::new();
            while begun.elapsed() < time {
                let events = (0..RAW_EVENTS).map(|_| self.fresh.next()).collect();
                let sent = Instant::now();
                connection.book(events).await?;
                latencies.push(sent.elapsed());
            }
            anyhow::Ok(latencies)
        };
        let latencies = try_join_all(self.raw.iter().map(write)).await?.concat();
        let slice = Slice::of(latencies, begun.elapsed());
        Ok(Slice {
            calls: slice.calls * RAW_EVENTS as u64,
            ..slice
        })
    }

    fn turn(
        &self,
        calls: &Calls,
        in_flight: usize,
        until: Until,
        plan: &Plan,
        postgres: Postgres,
    ) -> anyhow::Result<Slice> {
        let in_flight = InFlight::new(in_flight, CONNECTIONS);
        let threads = plan.options.threads();
        let slice = watch_postgres(postgres, || {
            load::run(&self.server, calls, in_flight, threads, until)
        })?;
        if slice.wrong > 0 {
            eprintln!(
                "==> beside {} events {} calls failed, with {:?}\n{}",
                self.events,
                slice.wrong,
                slice.first_wrong,
                self.server.complaints()
            );
        }
        Ok(slice)
    }
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Makes both months anew.
async fn fill(client: &Client, parts: &[Part; 2]) -> anyhow::Result<()> {
    let people = "CREATE UNLOGGED TABLE IF NOT EXISTS people AS
        SELECT id, row_number() OVER () - 1 AS number FROM users";
    client.batch_execute(people).await?;
    for part in parts {
        let table = format!("usage_records_{}", part.month.to_string().replace('-', "_"));
        let month = part.month;
        let make = format!(
            "DROP TABLE IF EXISTS {table};
             CREATE TABLE {table} (LIKE usage_records INCLUDING DEFAULTS INCLUDING CONSTRAINTS)"
        );
        client.batch_execute(&make).await?;
        let mut first = 0;
        while first < part.events {
            let last = (first + CHUNK).min(part.events) - 1;
            client
                .batch_execute(&chunk(&table, part, first, last))
                .await?;
            first = last + 1;
            if part.events > CHUNK {
                eprintln!("==> {month}: {first} of {}", part.events);
            }
        }
        // As full as pages are that were split where a bucket's latest events are. As full as Postgres
        // builds them, those would all split at about the same time, soon after.
        let index = format!(
            "CREATE INDEX ON {table}
                 (usage_bucket(user_id), occurred_at DESC, event_id DESC, user_id DESC)
             WITH (deduplicate_items = off, fillfactor = 50)"
        );
        client.batch_execute(&index).await?;
        let attach =
            format!("ALTER TABLE usage_records ATTACH PARTITION {table} FOR VALUES IN ('{month}')");
        client.batch_execute(&attach).await?;
    }
    Ok(())
}

/// Inserts the events from `first` to `last` of a month, evenly spread over its time.
fn chunk(table: &str, part: &Part, first: u64, last: u64) -> String {
    let Part {
        month,
        begin,
        end,
        events,
    } = part;
    let step = (*end - *begin).num_microseconds().unwrap_or_default() / (*events).max(1) as i64;
    let begin = begin.format("%F %T%:z");
    let models = MODELS.map(|model| format!("'{model}'")).join(", ");
    let (key, value) = LABEL;
    // Ids begin with the milliseconds, as UUIDv7 do.
    format!(
        "INSERT INTO {table} (usage_month, user_id, event_id, occurred_at, model, input_tokens,
             output_tokens, cached_input_tokens, cache_write_tokens, reasoning_tokens, request_id,
             labels, recorded_at)
         SELECT '{month}', people.id,
             (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
                 || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid,
             at, (ARRAY[{models}])[1 + n % 3], 400 + n % 256, 120 + n % 64, 1024, 0, 0,
             'req-' || substr(md5(n::text), 1, 16), '{{\"{key}\":\"{value}\"}}', at
         FROM generate_series({first}::bigint, {last}) AS n,
             LATERAL (SELECT '{begin}'::timestamptz + n * interval '{step} microseconds' AS at)
                 AS moment,
             people
         WHERE people.number
             = (hashint8(n)::bigint + 2147483648) % (SELECT count(*) FROM people)"
    )
}

/// Adds all events to both sums, which hold none of them yet.
fn add_to_sums() -> String {
    let columns = [
        "input_tokens",
        "output_tokens",
        "cached_input_tokens",
        "cache_write_tokens",
        "reasoning_tokens",
        "request_count",
    ];
    let names = columns.join(", ");
    let added = columns.map(|name| format!("{name} = m.{name} + EXCLUDED.{name}"));
    let added = added.join(", ");
    let events = "sum(input_tokens), sum(output_tokens), sum(cached_input_tokens),
        sum(cache_write_tokens), sum(reasoning_tokens), count(*)";
    format!(
        "WITH by_model AS MATERIALIZED (
             SELECT user_id, usage_month, model, {events} FROM usage_records
             GROUP BY 1, 2, 3 ORDER BY 2, 1, 3
         )
         INSERT INTO monthly_model_usage AS m (user_id, month, model, {names})
         SELECT * FROM by_model
         ON CONFLICT (user_id, month, model) DO UPDATE SET {added}"
    )
}
