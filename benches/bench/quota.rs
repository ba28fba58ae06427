//! Part `quota`: what deciding about quota costs, beside a no-op echo and beside asking a database for
//! each decision.

mod naive;

use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use prost::Message as _;
use serde_json::json;
use tokio::runtime::Runtime;
use tollkeeper::proto::tollkeeper::{
    auth::v1::ValidateTokenRequest,
    usage::v1::{
        CheckQuotaRequest, CommitReservationRequest, RecordUsageRequest, ReleaseReservationRequest,
        ReserveQuotaRequest, TokenCounts, UsageEvent, usage_service_client::UsageServiceClient,
    },
};
use tonic::{Code, transport::Channel};
use uuid::Uuid;

use crate::{
    Options, cores,
    fixture::{Fixture, with_bearer},
    load::{self, Calls, InFlight, Slice, Until},
    process::Server,
    report::{self, Chart, Panel, Row},
};
pub(crate) use naive::{Shape, serve as serve_naively};

const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const SERVICE: &str = "tollkeeper.usage.v1.UsageService";
const CHECK_QUOTA: &str = "/tollkeeper.usage.v1.UsageService/CheckQuota";
const RESERVE_QUOTA: &str = "/tollkeeper.usage.v1.UsageService/ReserveQuota";
const COMMIT: &str = "/tollkeeper.usage.v1.UsageService/CommitReservation";
const RELEASE: &str = "/tollkeeper.usage.v1.UsageService/ReleaseReservation";
const RECORD: &str = "/tollkeeper.usage.v1.UsageService/RecordUsage";

const CONNECTIONS: usize = 8;
const WARMING_UP: usize = 1_024;
/// Fewer than a server keeps at a time, of all turns of a panel together.
const MAX_HOLDS: usize = 900_000;
const TOKENS: i64 = 100;
const MODEL: &str = "a-model";

/// The second tier is one whose users are near their limit from the start: what is left is less than
/// twice what a request wants, so that each is decided about in the database.
const TIERS: &str = "
default = \"free\"

[[tier]]
name = \"free\"
monthly_tokens = 1000000000

[[tier]]
name = \"tight\"
monthly_tokens = 150

[[tier]]
name = \"advanced\"
";

pub(crate) struct Plan {
    pub(crate) options: Options,
    pub(crate) in_flight: Vec<usize>,
    pub(crate) users: usize,
    /// Beside the echo; none is all.
    pub(crate) parts: Vec<Part>,
}

impl Plan {
    fn has(&self, part: Part) -> bool {
        self.parts.is_empty() || part == Part::Echo || self.parts.contains(&part)
    }
}

/// What is compared, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    Echo,
    LongEcho,
    Check,
    Reserve,
    Exact,
    Select,
    Upsert,
    Redis,
    /// What ends reservations.
    Settle,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::LongEcho => "long-echo",
            Self::Check => "check",
            Self::Reserve => "reserve",
            Self::Exact => "exact",
            Self::Select => "naive-select",
            Self::Upsert => "naive-upsert",
            Self::Redis => "naive-redis",
            Self::Settle => "settle",
        }
    }

    fn title(self, users: usize) -> String {
        match self {
            Self::Echo => "no-op echo, our build, thread per core".to_owned(),
            Self::LongEcho => "the same, answers as long as ReserveQuota's".to_owned(),
            Self::Check => format!("CheckQuota, {users} users"),
            Self::Reserve => format!("ReserveQuota from leases, {users} users"),
            Self::Exact => "ReserveQuota of users near their limit".to_owned(),
            Self::Select => "a SELECT for each check, pool of 16".to_owned(),
            Self::Upsert => "an upsert for each check, pool of 16".to_owned(),
            Self::Redis => "an INCRBY for each check, pipelined".to_owned(),
            Self::Settle => "what ends reservations".to_owned(),
        }
    }
}

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    eprintln!("==> filling a database with {} users", 2 * plan.users);
    let fixture = Fixture::start(&plan.options.service, 2 * plan.users, None);
    let fixture = runtime.block_on(fixture)?;
    let measured = measure(plan, &fixture, &runtime);
    runtime.block_on(fixture.close())?;
    let (decide, settle) = measured?;
    for panel in &settle {
        panel.print("record", "none");
    }
    let json_of = |panels: &[Panel], base| -> Vec<_> {
        panels.iter().map(|panel| panel.json(base)).collect()
    };
    let result = json!({
        "cores": cores(), "rounds": plan.options.rounds(), "users": plan.users,
        "slice_seconds": plan.options.slice().as_secs_f64(),
        "client_threads": plan.options.threads(),
        "decide": json_of(&decide, "echo"), "settle": json_of(&settle, "record"),
    });
    let folder = &plan.options.results;
    report::write_json(folder, "quota", &result)?;
    let title = format!(
        "Decisions about quota, {} cores for client and server",
        cores()
    );
    let chart = Chart {
        title: &title,
        base: "echo",
        base_title: "the no-op echo on the same serving shape",
        cpu_of: "the server per call",
        unit: "calls",
        grey: &["echo", "long-echo", "naive"],
    };
    report::write_chart(folder, "quota", &chart, &decide)?;
    println!(
        "written to {0}/quota.json and {0}/quota.svg",
        folder.display()
    );
    let panels = decide.iter().chain(&settle);
    report::ensure_expected(panels.flat_map(|panel| &panel.rows))
}

/// What is done in memory, as multiples of an echo of its length and of asking each time.
fn print_against(panel: &Panel) {
    let asked = ["long-echo", "naive-select", "naive-upsert", "naive-redis"];
    for row in ["check", "reserve", "exact"]
        .iter()
        .filter_map(|part| panel.row(part))
    {
        let against = asked.iter().filter_map(|part| panel.row(part)).map(|to| {
            let ratio = row.ratio(to, Slice::per_second);
            let spread = format!("{:.2}–{:.2}", ratio.min, ratio.max);
            format!("{:.2} × {} ({spread})", ratio.median, to.part)
        });
        println!(
            "  {}: {}",
            row.title,
            against.collect::<Vec<_>>().join(", ")
        );
    }
}

fn measure(
    plan: &Plan,
    fixture: &Fixture,
    runtime: &Runtime,
) -> anyhow::Result<(Vec<Panel>, Vec<Panel>)> {
    let (people, tight) = fixture.people.split_at(plan.users);
    let ids = |people: &[crate::fixture::Person]| -> Vec<String> {
        people
            .iter()
            .map(|person| person.user.to_string())
            .collect()
    };
    let stage = Stage {
        plan,
        fixture,
        runtime,
        people: ids(people),
        tight: ids(tight),
        next: AtomicUsize::new(0),
    };
    let all = stage.tight.iter().map(|id| format!("'{id}'"));
    let all: Vec<_> = all.collect();
    stage.sql(&format!(
        "UPDATE users SET tier = 'tight' WHERE id = ANY (ARRAY[{}]::uuid[])",
        all.join(", ")
    ))?;
    stage.sql(naive::BALANCES)?;
    stage.sql("VACUUM ANALYZE users, naive_balances")?;
    let redis = Redis::start(fixture)?;
    let mut decide = Vec::new();
    for &in_flight in &plan.in_flight {
        let panel = stage.decide(in_flight, redis.as_ref())?;
        // Told of as soon as it is done: what follows takes long.
        panel.print("echo", "none");
        print_against(&panel);
        decide.push(panel);
    }
    let mut settle = Vec::new();
    for &in_flight in plan.in_flight.iter().filter(|_| plan.has(Part::Settle)) {
        settle.push(stage.settle(in_flight)?);
    }
    Ok((decide, settle))
}

struct Stage<'a> {
    plan: &'a Plan,
    fixture: &'a Fixture,
    runtime: &'a Runtime,
    people: Vec<String>,
    tight: Vec<String>,
    /// Of those near their limits: each may reserve once.
    next: AtomicUsize,
}

impl Stage<'_> {
    /// A service that holds nothing yet. Reservations outlive it, so what they leave is taken away.
    fn service(&self, name: &str) -> anyhow::Result<Server> {
        let tiers = self.fixture.folder().join("tiers.toml");
        fs::write(&tiers, TIERS)?;
        let tiers = tiers.to_string_lossy();
        self.fixture
            .serve(name, &[("TOLLKEEPER_USAGE_TIERS_FILE", &tiers)])
    }

    fn forget(&self) -> anyhow::Result<()> {
        self.next.store(0, Ordering::Relaxed);
        self.sql(
            "TRUNCATE replicas, quota_leases, quota_balances, quota_settlements, usage_records,
             monthly_model_usage",
        )
    }

    fn sql(&self, statement: &str) -> anyhow::Result<()> {
        self.runtime.block_on(self.fixture.sql(statement))
    }

    fn caller(&self) -> Option<&str> {
        Some(&self.fixture.service_key)
    }

    /// Requests as long as those that reserve.
    fn echo(&self, are_answers_long: bool) -> Calls {
        let request = |id: &String| ValidateTokenRequest {
            token: format!("{id}{:0>72}", ""),
            include_quota: are_answers_long,
            ..ValidateTokenRequest::default()
        };
        let all = self.people.iter().map(|id| request(id).encode_to_vec());
        Calls::new(VALIDATE, self.caller(), all, Code::Ok).drawn_at_random()
    }

    fn check(&self) -> Calls {
        let request = |id: &String| CheckQuotaRequest {
            user_id: id.clone(),
            tokens: TOKENS,
            ..CheckQuotaRequest::default()
        };
        let all = self.people.iter().map(|id| request(id).encode_to_vec());
        Calls::new(CHECK_QUOTA, self.caller(), all, Code::Ok).drawn_at_random()
    }

    /// Each reservation is a request of its own. They are made before, as those to the echo are: whoever
    /// makes them would take the time from whoever answers.
    fn reserve(&self) -> Calls {
        let someone = |call| &self.people[load::scattered(call) % self.people.len()];
        let all = (0..self.most_held()).map(|call| wish(someone(call)).encode_to_vec());
        Calls::new(RESERVE_QUOTA, self.caller(), all, Code::Ok)
    }

    /// So many may be held in all turns together, beside what the warm-up holds.
    fn most_held(&self) -> usize {
        MAX_HOLDS.saturating_sub(2 * self.people.len())
    }

    /// The decisions, one panel. All holds of a panel end after it.
    fn decide(&self, total: usize, redis: Option<&Redis>) -> anyhow::Result<Panel> {
        let (me, options) = (std::env::current_exe()?, &self.plan.options);
        self.forget()?;
        let service = self.service("quota")?;
        let naive = |shape: Shape, url: &str| {
            Server::echo(
                &me,
                &["naive-quota", "--shape", shape.as_arg(), "--url", url],
            )
        };
        let echo = Server::echo(&me, &["echo", "--shape", "workers"])?;
        let url = self.fixture.database_url();
        let (select, upsert) = (naive(Shape::Select, url)?, naive(Shape::Upsert, url)?);
        let over_redis = redis
            .map(|redis| naive(Shape::Redis, &redis.address))
            .transpose()?;
        let (check, reserve) = (self.check(), self.reserve());
        let (short_answers, long_answers) = (self.echo(false), self.echo(true));
        self.warm_up(&service)?;

        let in_flight = InFlight::new(total, CONNECTIONS);
        let mut parts = vec![
            Part::Echo,
            Part::LongEcho,
            Part::Check,
            Part::Reserve,
            Part::Exact,
        ];
        parts.extend([Part::Select, Part::Upsert]);
        parts.extend(over_redis.as_ref().map(|_| Part::Redis));
        parts.retain(|part| self.plan.has(*part));
        let time = Until::time(options.slice());
        // What it holds, it holds for minutes.
        let while_holding = Until {
            calls: self.most_held() / (options.rounds() + 1),
            ..time
        };
        let threads = options.threads();
        let turn = |part: Part| match part {
            Part::Echo => load::run(&echo, &short_answers, in_flight, threads, time),
            Part::LongEcho => load::run(&echo, &long_answers, in_flight, threads, time),
            Part::Check => load::run(&service, &check, in_flight, threads, time),
            Part::Reserve => load::run(&service, &reserve, in_flight, threads, while_holding),
            Part::Exact => self.exact(&service, in_flight),
            Part::Select => load::run(&select, &check, in_flight, threads, time),
            Part::Upsert => load::run(&upsert, &check, in_flight, threads, time),
            Part::Redis => {
                let server = over_redis.as_ref().context("there is no Redis")?;
                load::run(server, &check, in_flight, threads, time)
            }
            Part::Settle => bail!("that has a panel of its own"),
        };
        let rows = parts
            .iter()
            .map(|part| Row::new(part.name(), part.title(self.plan.users)));
        let title = format!("{total} in flight");
        panel(options, title, rows.collect(), |index| turn(parts[index]))
    }

    /// Everybody's lease is there.
    fn warm_up(&self, service: &Server) -> anyhow::Result<()> {
        let all = self.people.iter().map(|id| wish(id).encode_to_vec());
        let all = Calls::new(RESERVE_QUOTA, self.caller(), all, Code::Ok);
        let until = Until {
            time: Duration::from_secs(120),
            calls: all.len(),
        };
        // Many at once, so that many leases are had in one transaction.
        let in_flight = InFlight::new(WARMING_UP, CONNECTIONS);
        let run = || load::run(service, &all, in_flight, 1, until);
        // A burst of users never seen may take longer than anybody waits; then they are known.
        run()?;
        let slice = run()?;
        let said = || format!("{:?}\n{}", slice.first_wrong, service.complaints());
        ensure!(slice.wrong == 0, "{} calls failed: {}", slice.wrong, said());
        Ok(())
    }

    /// Reserves once for each of the next who are near their limits.
    fn exact(&self, service: &Server, in_flight: InFlight) -> anyhow::Result<Slice> {
        let options = &self.plan.options;
        let begin = self.next.load(Ordering::Relaxed);
        // In equal parts for the rounds, and for the one before them.
        let part = self.tight.len() / (options.rounds() + 1);
        let part = self
            .tight
            .get(begin..begin + part)
            .context("everybody has reserved")?;
        let all = part.iter().map(|id| wish(id).encode_to_vec());
        let all = Calls::new(RESERVE_QUOTA, self.caller(), all, Code::Ok);
        let until = Until {
            time: options.slice(),
            calls: all.len(),
        };
        self.next.fetch_add(part.len(), Ordering::Relaxed);
        load::run(service, &all, in_flight, options.threads(), until)
    }

    /// What ends reservations, beside booking what was never reserved.
    fn settle(&self, total: usize) -> anyhow::Result<Panel> {
        self.forget()?;
        let (service, other) = (self.service("owner")?, self.service("other")?);
        self.warm_up(&service)?;
        let options = &self.plan.options;
        let in_flight = InFlight::new(total, CONNECTIONS);
        let rows = vec![
            Row::new("record", "RecordUsage".to_owned()),
            Row::new(
                "commit",
                "CommitReservation where it was reserved".to_owned(),
            ),
            Row::new(
                "commit-elsewhere",
                "CommitReservation on another server".to_owned(),
            ),
            Row::new(
                "release",
                "ReleaseReservation where it was reserved".to_owned(),
            ),
            Row::new(
                "release-elsewhere",
                "ReleaseReservation on another server".to_owned(),
            ),
        ];
        let turn = |index: usize| {
            // More than a turn uses, with some left for a server that is faster than expected.
            let count = (options.slice().as_secs_f64() * 20_000.0) as usize;
            let (path, messages) = match index {
                0 => (RECORD, self.events(count)),
                1 | 2 => (COMMIT, self.reservations(&service, count, commit)?),
                _ => (RELEASE, self.reservations(&service, count, release)?),
            };
            let server = if matches!(index, 2 | 4) {
                &other
            } else {
                &service
            };
            let calls = Calls::new(path, self.caller(), messages, Code::Ok);
            let until = Until {
                time: options.slice(),
                calls: calls.len(),
            };
            load::run(server, &calls, in_flight, options.threads(), until)
        };
        panel(
            options,
            format!("settling, {total} in flight; × RecordUsage, not × echo"),
            rows,
            turn,
        )
    }

    fn events(&self, count: usize) -> Vec<Vec<u8>> {
        let event = |number: usize| UsageEvent {
            event_id: Uuid::now_v7().to_string(),
            occurred_at: Some(std::time::SystemTime::now().into()),
            user_id: self.people[load::scattered(number) % self.people.len()].clone(),
            model: MODEL.to_owned(),
            tokens: Some(used()),
            request_id: Uuid::now_v7().to_string(),
            ..UsageEvent::default()
        };
        let request = |number| RecordUsageRequest {
            event: Some(event(number)),
        };
        (0..count)
            .map(|number| request(number).encode_to_vec())
            .collect()
    }

    /// Reserves, and writes down what ends each.
    fn reservations(
        &self,
        service: &Server,
        count: usize,
        end: fn(String) -> Vec<u8>,
    ) -> anyhow::Result<Vec<Vec<u8>>> {
        self.runtime.block_on(async {
            let channel = Channel::from_shared(format!("http://{}", service.address))?;
            let channel = channel.connect().await?;
            stream::iter(0..count)
                .map(|number| {
                    let mut client = UsageServiceClient::new(channel.clone());
                    let user = &self.people[load::scattered(number) % self.people.len()];
                    let (wish, key) = (wish(user), &self.fixture.service_key);
                    async move {
                        // Many users who were not seen before make the first answers late.
                        loop {
                            let request = with_bearer(wish.clone(), key)?;
                            match client.reserve_quota(request).await {
                                Err(status) if status.code() == Code::Unavailable => {}
                                reserved => {
                                    let reserved = reserved?.into_inner();
                                    return anyhow::Ok(end(reserved.reservation));
                                }
                            }
                        }
                    }
                })
                .buffer_unordered(64)
                .try_collect()
                .await
                .with_context(|| format!("{SERVICE} does not reserve"))
        })
    }
}

/// Lets all rows have their turns, round by round, in a rotated order.
pub(crate) fn panel(
    options: &Options,
    title: String,
    mut rows: Vec<Row>,
    turn: impl Fn(usize) -> anyhow::Result<Slice>,
) -> anyhow::Result<Panel> {
    eprintln!("==> {title}");
    // The first round fills pools and caches.
    for index in 0..rows.len() {
        turn(index)?;
    }
    for round in 0..options.rounds() {
        for step in 0..rows.len() {
            let index = (step + round) % rows.len();
            rows[index].rounds.push(turn(index)?);
        }
    }
    Ok(Panel { title, rows })
}

fn wish(user: &str) -> ReserveQuotaRequest {
    ReserveQuotaRequest {
        user_id: user.to_owned(),
        request_id: Uuid::now_v7().to_string(),
        model: MODEL.to_owned(),
        tokens: TOKENS,
        ..ReserveQuotaRequest::default()
    }
}

fn used() -> TokenCounts {
    TokenCounts {
        input: TOKENS / 2,
        output: TOKENS / 4,
        ..TokenCounts::default()
    }
}

fn commit(reservation: String) -> Vec<u8> {
    let request = CommitReservationRequest {
        reservation,
        tokens: Some(used()),
        ..CommitReservationRequest::default()
    };
    request.encode_to_vec()
}

fn release(reservation: String) -> Vec<u8> {
    ReleaseReservationRequest { reservation }.encode_to_vec()
}

/// A Redis that keeps all in memory and writes nothing down. Dropping it ends it.
struct Redis {
    address: String,
    child: Child,
}

impl Redis {
    /// `None`: it is not installed.
    fn start(fixture: &Fixture) -> anyhow::Result<Option<Self>> {
        // Taken, and free again.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no"])
            .current_dir(fixture.folder())
            .stdout(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            eprintln!("==> redis-server is not installed: there is no row for it");
            return Ok(None);
        };
        let redis = Self {
            address: format!("127.0.0.1:{port}"),
            child,
        };
        let begun = Instant::now();
        while std::net::TcpStream::connect(&redis.address).is_err() {
            ensure!(
                begun.elapsed() < Duration::from_secs(10),
                "Redis does not listen"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Some(redis))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
