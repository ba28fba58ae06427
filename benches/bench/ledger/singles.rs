//! One event a call.

use std::time::Instant;

use crate::{
    load::Slice,
    process::{Burner, Server},
    report::{Chart, Row},
};

use super::{
    Comparison, Stage,
    events::{Events, Users},
    naive::Shape,
    raw, watch_postgres,
};

/// Calls under way at which a busy machine shows a writer that wakes late.
const CONTENDED_AT_MOST: usize = 16;

/// As many times the rounds on a busy machine: there one differs from the next by half.
const CONTENDED_ROUNDS: usize = 3;

/// The servers that are compared, in the order of the table.
struct Servers<'a> {
    naive: Server,
    single: Server,
    ours: &'a Server,
}

impl<'a> Servers<'a> {
    fn start(stage: &'a Stage<'_>) -> anyhow::Result<Self> {
        let me = std::env::current_exe()?;
        let url = stage.fixture.database_url();
        let serve = |shape: Shape| {
            let args = ["naive", "--shape", shape.as_arg(), "--database-url", url];
            Server::echo(&me, &args)
        };
        Ok(Self {
            naive: serve(Shape::Naive)?,
            single: serve(Shape::Single)?,
            ours: &stage.service,
        })
    }

    fn rows() -> Vec<Row> {
        vec![
            Row::new("naive", "naive: four round trips, pool of 16".to_owned()),
            Row::new("single", "the same, one statement".to_owned()),
            Row::new("ours", "ours".to_owned()),
        ]
    }

    fn get(&self, index: usize) -> &Server {
        match index {
            0 => &self.naive,
            1 => &self.single,
            _ => self.ours,
        }
    }
}

/// Many calls at once.
pub(super) fn many(stage: &Stage<'_>) -> anyhow::Result<Comparison> {
    let servers = Servers::start(stage)?;
    let mut panels = Vec::new();
    for users in [Users::Uniform, Users::Hot] {
        for &in_flight in &stage.plan.in_flight {
            let calls = stage.calls(users);
            let turn = |index| stage.turn(servers.get(index), &calls, in_flight);
            let title = format!("{in_flight} in flight, {}", users.title(stage.people.len()));
            panels.push(stage.panel(title.clone(), Servers::rows(), turn)?);
            if in_flight <= CONTENDED_AT_MOST {
                let _burner = Burner::start()?;
                let title = format!("{title}, every core kept busy by another process");
                let rounds = CONTENDED_ROUNDS * stage.plan.options.rounds();
                panels.push(stage.panel_of(rounds, title, Servers::rows(), turn)?);
            }
        }
    }
    Ok(Comparison {
        part: "single",
        chart: Chart {
            title: "RecordUsage against a naive handler, all durable",
            base: "naive",
            base_title: "the naive handler",
            cpu_of: "service and Postgres per event",
            unit: "events",
            grey: &["naive", "single"],
        },
        panels,
    })
}

/// One call at a time.
pub(super) fn lonely(stage: &Stage<'_>) -> anyhow::Result<Comparison> {
    let servers = Servers::start(stage)?;
    let calls = stage.calls(Users::Uniform);
    let events = Events::of(&stage.people, Users::Uniform);
    let connection = stage
        .runtime
        .block_on(raw::Connection::open(stage.fixture.database_url()))?;
    let bare = || {
        let work = bare(stage, &connection, &events);
        watch_postgres(stage.postgres, || stage.runtime.block_on(work))
    };
    let mut rows = vec![Row::new(
        "bare",
        "the statement on one connection".to_owned(),
    )];
    rows.extend(Servers::rows());
    let turn = |index: usize| match index.checked_sub(1) {
        None => bare(),
        Some(index) => stage.turn(servers.get(index), &calls, 1),
    };
    Ok(Comparison {
        part: "lonely",
        chart: Chart {
            title: "One event at a time against the bare statement",
            base: "bare",
            base_title: "the bare statement",
            cpu_of: "service and Postgres per event",
            unit: "events",
            grey: &["bare", "naive", "single"],
        },
        panels: vec![stage.panel("one in flight".to_owned(), rows, turn)?],
    })
}

/// One commit after the other, without a service.
async fn bare(
    stage: &Stage<'_>,
    connection: &raw::Connection,
    events: &Events,
) -> anyhow::Result<Slice> {
    let begun = Instant::now();
    let mut latencies = Vec::new();
    while begun.elapsed() < stage.plan.options.slice() {
        let event = events.next();
        let sent = Instant::now();
        connection.book_one(&event).await?;
        latencies.push(sent.elapsed());
    }
    Ok(Slice::of(latencies, begun.elapsed()))
}

impl Users {
    fn title(self, people: usize) -> String {
        match self {
            Self::Hot => "one hot user".to_owned(),
            Self::Uniform | Self::InTurn => format!("{people} users"),
        }
    }
}
