//! Part `ledger`: what booking usage costs, against a naive handler and against Postgres alone.
//!
//! What is acknowledged is on the disk in all of it. After each panel the sums
//! are held against the events that were acknowledged, so that nothing is measured that did not
//! happen.

mod batches;
mod events;
mod growth;
mod naive;
mod raw;
mod singles;

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use nix::unistd::{SysconfVar, sysconf};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio_postgres::NoTls;
use uuid::Uuid;

use crate::{
    Options, cores,
    fixture::Fixture,
    load::{self, Calls, InFlight, Slice, Until},
    process::{Postgres, Server},
    report::{self, Chart, Panel, Row, times, wrong},
    runtime,
};
use events::{Events, MODELS, Users};
pub(crate) use naive::{Shape, serve as serve_naively};

/// Connections of the load at most.
const CONNECTIONS: usize = 8;

/// The row that writes elsewhere: its events are not in the sums.
const NOT_BOOKED: &str = "copy";

pub(crate) struct Plan {
    pub(crate) options: Options,
    pub(crate) parts: Vec<Part>,
    pub(crate) in_flight: Vec<usize>,
    /// Events of a batch.
    pub(crate) batches: Vec<usize>,
    pub(crate) users: usize,
    /// Events that are there already, of one ledger each.
    pub(crate) existing: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// One event a call, many calls at once
    Single,
    /// One event at a time
    Lonely,
    /// Many events a call, and streams of them
    Batch,
    /// One event a call beside few and many events that are there already
    Growth,
}

/// What is measured against what in the panels of one part.
struct Comparison {
    part: &'static str,
    chart: Chart<'static>,
    panels: Vec<Panel>,
}

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let runtime = runtime()?;
    eprintln!("==> filling a database with {} users", plan.users);
    let service = &plan.options.service;
    let settings = settings_of_postgres()?;
    let fixture = Fixture::start_with(service, plan.users, None, settings);
    let fixture = runtime.block_on(fixture)?;
    let measured = measure(plan, &fixture, &runtime);
    runtime.block_on(fixture.close())?;
    let comparisons = measured?;
    let panels = comparisons.iter().flat_map(|comparison| &comparison.panels);
    report::ensure_expected(panels.flat_map(|panel| &panel.rows))
}

/// What the manual of Postgres advises for a machine of its own, "Resource Consumption" and "Write
/// Ahead Log": a quarter of the memory, and checkpoints that the time calls for and not the writing.
/// All that is compared runs on it.
fn settings_of_postgres() -> anyhow::Result<Vec<(String, String)>> {
    let pages = sysconf(SysconfVar::_PHYS_PAGES)?.context("no number of pages")?;
    let page = sysconf(SysconfVar::PAGE_SIZE)?.context("no size of a page")?;
    let quarter = pages * page / 4 / 1024;
    let settings = [
        ("shared_buffers", format!("{quarter}kB")),
        ("max_wal_size", "16GB".to_owned()),
        // A service for each size that is compared.
        ("max_connections", "300".to_owned()),
    ];
    Ok(settings
        .map(|(name, value)| (name.to_owned(), value))
        .into())
}

/// Each part is told of as soon as it is done: later ones take long.
fn measure(plan: &Plan, fixture: &Fixture, runtime: &Runtime) -> anyhow::Result<Vec<Comparison>> {
    let wanted = |part: Part| plan.parts.is_empty() || plan.parts.contains(&part);
    let mut comparisons = Vec::new();
    let mut tell = |comparison: Comparison| {
        comparison.tell(plan)?;
        comparisons.push(comparison);
        anyhow::Ok(())
    };
    let stage = Stage::set(plan, fixture, runtime)?;
    if wanted(Part::Single) {
        tell(singles::many(&stage)?)?;
    }
    if wanted(Part::Lonely) {
        tell(singles::lonely(&stage)?)?;
    }
    if wanted(Part::Batch) {
        tell(batches::compare(&stage)?)?;
    }
    stage.clear()?;
    // A database that somebody is connected to cannot be copied.
    drop(stage);
    if wanted(Part::Growth) {
        tell(growth::compare(plan, fixture, runtime)?)?;
    }
    Ok(comparisons)
}

/// A database with people, and the service on it.
struct Stage<'a> {
    plan: &'a Plan,
    fixture: &'a Fixture,
    runtime: &'a Runtime,
    people: Arc<[Uuid]>,
    service: Server,
    postgres: Postgres,
}

impl<'a> Stage<'a> {
    fn set(plan: &'a Plan, fixture: &'a Fixture, runtime: &'a Runtime) -> anyhow::Result<Self> {
        let stage = Self {
            plan,
            fixture,
            runtime,
            people: fixture.people.iter().map(|person| person.user).collect(),
            service: fixture.serve("service", &[])?,
            postgres: fixture.postgres()?,
        };
        stage.sql(raw::STAGING)?;
        stage.sql(naive::MONTHS)?;
        // As in the middle of a month: everybody has used every model.
        let models = MODELS.map(|model| format!("('{model}')")).join(", ");
        stage.sql(&format!(
            "INSERT INTO monthly_model_usage (user_id, month, model, input_tokens, output_tokens,
                 cached_input_tokens, cache_write_tokens, reasoning_tokens, request_count)
             SELECT id, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), model, 0, 0, 0, 0, 0, 0
             FROM users, (VALUES {models}) AS models (model)"
        ))?;
        stage.sql(raw::SUMS_IN_USE)?;
        // The service reads every user once.
        let calls = stage.calls(Users::InTurn);
        let until = Until {
            time: Duration::from_secs(60),
            calls: stage.people.len(),
        };
        let slice = load::run(&stage.service, &calls, InFlight::new(512, 8), 1, until)?;
        ensure!(
            slice.wrong == 0,
            "{} calls failed, with {:?}\n{}",
            slice.wrong,
            slice.first_wrong,
            stage.service.complaints(),
        );
        Ok(stage)
    }

    fn calls(&self, users: Users) -> Calls {
        Events::of(&self.people, users).calls(&self.fixture.service_key)
    }

    /// Takes the events away and leaves the sums as they are, so that each panel begins alike.
    fn clear(&self) -> anyhow::Result<()> {
        for statement in [
            "TRUNCATE usage_records, staged",
            "VACUUM ANALYZE usage_records, monthly_model_usage, naive_months",
            "CHECKPOINT",
        ] {
            self.sql(statement)?;
        }
        Ok(())
    }

    fn sql(&self, statement: &str) -> anyhow::Result<()> {
        self.runtime.block_on(async {
            let url = self.fixture.database_url();
            let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
            let connection = tokio::spawn(connection);
            client.batch_execute(statement).await?;
            drop(client);
            Ok(connection.await??)
        })
    }

    /// How many events the table holds, and all sums together.
    fn counts(&self) -> anyhow::Result<Counts> {
        self.runtime.block_on(async {
            let url = self.fixture.database_url();
            let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
            let connection = tokio::spawn(connection);
            let row = client
                .query_one(
                    "SELECT (SELECT count(*) FROM usage_records),
                         (SELECT sum(request_count)::bigint FROM monthly_model_usage)
                         + (SELECT sum(request_count)::bigint FROM naive_months)",
                    &[],
                )
                .await?;
            drop(client);
            connection.await??;
            Ok(Counts {
                events: row.try_get(0)?,
                summed: row.try_get(1)?,
            })
        })
    }

    /// One turn of a server under load.
    fn turn(&self, server: &Server, calls: &Calls, in_flight: usize) -> anyhow::Result<Slice> {
        let options = &self.plan.options;
        let (threads, until) = (options.threads(), Until::time(options.slice()));
        let in_flight = InFlight::new(in_flight, CONNECTIONS);
        watch_postgres(self.postgres, || {
            load::run(server, calls, in_flight, threads, until)
        })
    }

    /// Lets all rows have their turns, round by round, and checks that all was booked.
    fn panel(
        &self,
        title: String,
        rows: Vec<Row>,
        turn: impl Fn(usize) -> anyhow::Result<Slice>,
    ) -> anyhow::Result<Panel> {
        self.panel_of(self.plan.options.rounds(), title, rows, turn)
    }

    /// As [`Stage::panel`], in as many rounds.
    fn panel_of(
        &self,
        rounds: usize,
        title: String,
        mut rows: Vec<Row>,
        turn: impl Fn(usize) -> anyhow::Result<Slice>,
    ) -> anyhow::Result<Panel> {
        eprintln!("==> {title}");
        self.clear()?;
        let before = self.counts()?;
        let mut booked = 0;
        // The first round fills pools and caches and writes pages in full after the checkpoint.
        for (index, row) in rows.iter().enumerate() {
            booked += row.booked(&turn(index)?);
        }
        for round in 0..rounds {
            for step in 0..rows.len() {
                let index = (step + round) % rows.len();
                let slice = turn(index)?;
                booked += rows[index].booked(&slice);
                rows[index].rounds.push(slice);
            }
        }
        before.check(&self.counts()?, booked)?;
        Ok(Panel { title, rows })
    }
}

/// Runs `work` and adds the processor time that Postgres used meanwhile.
fn watch_postgres(
    postgres: Postgres,
    work: impl FnOnce() -> anyhow::Result<Slice>,
) -> anyhow::Result<Slice> {
    let before = postgres.cpu()?;
    let slice = work()?;
    let cpu = postgres.cpu()? - before;
    Ok(Slice {
        postgres_cpu_us: cpu.as_secs_f64() * 1e6,
        ..slice
    })
}

struct Counts {
    events: i64,
    summed: i64,
}

impl Counts {
    /// Whether just what was acknowledged has been booked since.
    fn check(&self, now: &Self, acknowledged: u64) -> anyhow::Result<()> {
        let grown = [now.events - self.events, now.summed - self.summed];
        let acknowledged = i64::try_from(acknowledged)?;
        ensure!(
            grown == [acknowledged; 2],
            "{acknowledged} events were acknowledged; the events and their sums grew by {grown:?}"
        );
        Ok(())
    }
}

impl Row {
    /// How many events a turn of it has added to the sums.
    fn booked(&self, slice: &Slice) -> u64 {
        match self.part {
            NOT_BOOKED => 0,
            _ => slice.calls - slice.wrong,
        }
    }
}

impl Comparison {
    /// Prints and writes what there is.
    fn tell(&self, plan: &Plan) -> anyhow::Result<()> {
        for panel in &self.panels {
            self.print(panel);
        }
        let (options, base) = (&plan.options, self.chart.base);
        let name = format!("ledger-{}", self.part);
        let result = json!({
            "cores": cores(), "rounds": options.rounds(),
            "slice_seconds": options.slice().as_secs_f64(), "client_threads": options.threads(),
            "users": plan.users,
            "panels": self.panels.iter().map(|panel| panel.json(base)).collect::<Vec<_>>(),
        });
        report::write_json(&options.results, &name, &result)?;
        report::write_chart(&options.results, &name, &self.chart, &self.panels)?;
        println!(
            "written to {0}/{name}.json and {0}/{name}.svg",
            options.results.display()
        );
        Ok(())
    }

    fn print(&self, panel: &Panel) {
        let base = panel.row(self.chart.base);
        println!("\n{}", panel.title);
        println!(
            "  {:<40} {:>8} {:>6} {:>11} {:>7} {:>6} {:>7} {:>8} {:>6} {:>9} {:>6}",
            "", "events/s", "×", "spread", "CPU µs", "×", "Pg. µs", "p50 µs", "×", "p99 µs", "×"
        );
        for row in &panel.rows {
            let ratio = |of: fn(&Slice) -> f64| base.map(|base| row.ratio(base, of));
            let median = |of: fn(&Slice) -> f64| row.spread(of).median;
            let against = ratio(Slice::per_second);
            println!(
                "  {:<40} {:>8.0} {:>6} {:>11} {:>7.1} {:>6} {:>7.1} {:>8.0} {:>6} {:>9.0} {:>6}{}",
                row.title,
                median(Slice::per_second),
                times(against.map(|s| s.median)),
                against.map_or_else(String::new, |s| format!("{:.2}–{:.2}", s.min, s.max)),
                median(Slice::cpu_us_per_call),
                times(ratio(Slice::cpu_us_per_call).map(|s| s.median)),
                median(|s| s.postgres_cpu_us / s.calls as f64),
                median(|s| s.p50_us),
                times(ratio(|s| s.p50_us).map(|s| s.median)),
                median(|s| s.p99_us),
                times(ratio(|s| s.p99_us).map(|s| s.median)),
                wrong(row),
            );
        }
    }
}
