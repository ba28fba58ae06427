//! Part `wire`: what a call costs.

use std::{path::Path, sync::atomic::AtomicUsize};

use anyhow::Context as _;
use clap::ValueEnum;
use prost::Message as _;
use serde_json::json;
use tokio::runtime::Runtime;
use tollkeeper::{
    auth::random_alphanumeric,
    proto::tollkeeper::{auth::v1::ValidateTokenRequest, usage::v1::CheckQuotaRequest},
};
use tonic::Code;

use crate::{
    Options, cores,
    fixture::Fixture,
    h2load,
    load::{self, Calls, InFlight, Slice, Until},
    process::Server,
    report::{self, Chart, Panel, Row, Spread},
    runtime,
};

const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const CHECK_QUOTA: &str = "/tollkeeper.usage.v1.UsageService/CheckQuota";

/// New tokens for one turn; a turn ends when they are used up.
const FRESH_TOKENS_PER_SECOND: f64 = 40_000.0;

pub(crate) struct Plan {
    pub(crate) options: Options,
    pub(crate) in_flight: Vec<usize>,
    pub(crate) parts: Vec<Part>,
    pub(crate) tokens: usize,
    pub(crate) connections: usize,
}

/// What is compared, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    EchoDefault,
    EchoShared,
    Echo,
    One,
    Many,
    ManyOneThread,
    ApiKeys,
    Cold,
    Garbage,
    Forged,
    Expired,
    Quota,
    /// Not a row of its own: our generator against h2load.
    H2load,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::EchoDefault => "echo-default",
            Self::EchoShared => "echo-shared",
            Self::Echo => "echo",
            Self::One => "one",
            Self::Many => "many",
            Self::ManyOneThread => "many-one-thread",
            Self::ApiKeys => "api-keys",
            Self::Cold => "cold",
            Self::Garbage => "garbage",
            Self::Forged => "forged",
            Self::Expired => "expired",
            Self::Quota => "quota",
            Self::H2load => "h2load",
        }
    }

    fn title(self, tokens: usize) -> String {
        match self {
            Self::EchoDefault => "no-op echo, default tonic build".to_owned(),
            Self::EchoShared => "no-op echo, our build, shared runtime".to_owned(),
            Self::Echo => "no-op echo, our build, thread per core".to_owned(),
            Self::One => "ValidateToken, one token".to_owned(),
            Self::Many => format!("ValidateToken, {tokens} tokens"),
            Self::ManyOneThread => format!("ValidateToken, {tokens} tokens, one thread"),
            Self::ApiKeys => format!("ValidateToken, {} API keys", api_keys(tokens)),
            Self::Cold => "ValidateToken, tokens never seen".to_owned(),
            Self::Garbage => "ValidateToken, garbage".to_owned(),
            Self::Forged => "ValidateToken, bad signature".to_owned(),
            Self::Expired => "ValidateToken, expired".to_owned(),
            Self::Quota => format!("CheckQuota, {tokens} users"),
            Self::H2load => "h2load".to_owned(),
        }
    }
}

/// Everything that is up and ready while the turns go round.
struct Stage<'a> {
    plan: &'a Plan,
    fixture: &'a Fixture,
    echo_default: Server,
    echo_shared: Server,
    echo: Server,
    service: Server,
    service_one_thread: Option<Server>,
    one: Calls,
    many: Calls,
    api_keys: Option<Calls>,
    quota: Calls,
    /// Where the next new tokens are taken from.
    next_person: AtomicUsize,
}

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let options = &plan.options;
    let runtime = runtime()?;
    eprintln!("==> filling a database with {} sessions", plan.tokens);
    let fixture = runtime.block_on(Fixture::start(&options.service, plan.tokens, None))?;
    let measured = measure(plan, &fixture, &runtime);
    runtime.block_on(fixture.close())?;
    let (panels, check) = measured?;
    for panel in &panels {
        panel.print("echo", "echo-default");
    }
    if let Some(check) = &check {
        print_check(check);
    }
    let bytes = |part| {
        let row = panels.first().and_then(|panel: &Panel| panel.row(part));
        row.map_or((0.0, 0.0), |row| {
            let slice = &row.rounds[0];
            (slice.request_bytes, slice.response_bytes)
        })
    };
    println!(
        "\nbytes of a call on the wire without headers: echo {:?}, ValidateToken {:?}",
        bytes("echo"),
        bytes("many")
    );
    let result = json!({
        "cores": cores(), "rounds": options.rounds(), "slice_seconds": options.slice().as_secs_f64(),
        "client_threads": options.threads(), "tokens": plan.tokens,
        "panels": panels.iter().map(|panel| panel.json("echo")).collect::<Vec<_>>(),
        "h2load": check.as_ref().map(|check| check.json("ours-echo")),
    });
    report::write_json(&options.results, "wire", &result)?;
    let title = format!(
        "Calls against a no-op echo, {} cores for client and server",
        cores()
    );
    let chart = Chart {
        title: &title,
        base: "echo",
        base_title: "the no-op echo on the same serving shape",
        cpu_of: "the server per call",
        unit: "calls",
        grey: &["echo"],
    };
    report::write_chart(&options.results, "wire", &chart, &panels)?;
    println!(
        "written to {0}/wire.json and {0}/wire.svg",
        options.results.display()
    );
    report::ensure_expected(panels.iter().flat_map(|panel| &panel.rows))
}

fn measure(
    plan: &Plan,
    fixture: &Fixture,
    runtime: &Runtime,
) -> anyhow::Result<(Vec<Panel>, Option<Panel>)> {
    let stage = Stage::set(plan, fixture, runtime)?;
    stage.warm_up()?;
    let parts = plan.rows();
    let mut panels = Vec::new();
    for &total in &plan.in_flight {
        let in_flight = InFlight::new(total, plan.connections);
        let title = format!(
            "{total} in flight ({} connections × {})",
            in_flight.connections, in_flight.streams
        );
        eprintln!("==> {title}");
        let rows = parts
            .iter()
            .map(|part| Row::new(part.name(), part.title(plan.tokens)));
        let mut rows: Vec<_> = rows.collect();
        for round in 0..plan.options.rounds() {
            for turn in 0..parts.len() {
                let index = (turn + round) % parts.len();
                rows[index]
                    .rounds
                    .push(stage.turn(parts[index], in_flight)?);
            }
        }
        panels.push(Panel { title, rows });
    }
    let wanted = plan.parts.is_empty() || plan.parts.contains(&Part::H2load);
    let check = match (wanted, h2load::is_installed()) {
        (true, true) => Some(stage.check_generator()?),
        (true, false) => {
            eprintln!("==> h2load is not installed: the generator is not checked");
            None
        }
        (false, _) => None,
    };
    Ok((panels, check))
}

impl Plan {
    fn rows(&self) -> Vec<Part> {
        let wanted =
            |part: &Part| *part == Part::Echo || self.parts.is_empty() || self.parts.contains(part);
        let all = Part::value_variants().iter().copied();
        all.filter(|part| *part != Part::H2load && wanted(part))
            .collect()
    }
}

impl<'a> Stage<'a> {
    fn set(plan: &'a Plan, fixture: &'a Fixture, runtime: &Runtime) -> anyhow::Result<Self> {
        let me = std::env::current_exe()?;
        let tokens: Vec<String> = shuffled(fixture.people.len())
            .map(|index| fixture.token(&fixture.people[index]))
            .collect::<anyhow::Result<_>>()?;
        let first = tokens.first().context("at least one token")?.clone();
        let users = shuffled(fixture.people.len()).map(|index| {
            let request = CheckQuotaRequest {
                user_id: fixture.people[index].user.to_string(),
                tokens: 100,
                ..CheckQuotaRequest::default()
            };
            request.encode_to_vec()
        });
        let caller = Some(fixture.service_key.as_str());
        let one_thread = plan.rows().contains(&Part::ManyOneThread);
        let one_thread =
            one_thread.then(|| fixture.serve("one-thread", &[("TOLLKEEPER_SERVER_THREADS", "1")]));
        let service = fixture.serve("service", &[])?;
        let api_keys = if plan.rows().contains(&Part::ApiKeys) {
            let count = api_keys(plan.tokens);
            eprintln!("==> making {count} API keys");
            let keys = runtime.block_on(fixture.api_keys(&service, count))?;
            Some(validate(caller, keys, Code::Ok))
        } else {
            None
        };
        Ok(Self {
            plan,
            fixture,
            echo_default: Server::echo(&plan.options.echo, &[])?,
            echo_shared: Server::echo(&me, &["echo", "--shape", "shared"])?,
            echo: Server::echo(&me, &["echo", "--shape", "workers"])?,
            service,
            service_one_thread: one_thread.transpose()?,
            one: validate(caller, [first], Code::Ok),
            many: validate(caller, tokens, Code::Ok),
            api_keys,
            quota: Calls::new(CHECK_QUOTA, caller, users, Code::Ok),
            next_person: AtomicUsize::new(0),
        })
    }

    /// Sends every token once, or for a minute, so that no turn begins cold.
    fn warm_up(&self) -> anyhow::Result<()> {
        let in_flight = InFlight::new(128, 8);
        let known = [
            (Some(&self.service), Some(&self.many)),
            (self.service_one_thread.as_ref(), Some(&self.many)),
            (Some(&self.service), self.api_keys.as_ref()),
        ];
        for (server, calls) in known {
            let (Some(server), Some(calls)) = (server, calls) else {
                continue;
            };
            let until = Until {
                time: std::time::Duration::from_secs(60),
                calls: calls.len(),
            };
            load::run(server, calls, in_flight, self.plan.options.threads(), until)?;
        }
        Ok(())
    }

    fn turn(&self, part: Part, in_flight: InFlight) -> anyhow::Result<Slice> {
        let options = &self.plan.options;
        let run = |server, calls| {
            let until = Until::time(options.slice());
            load::run(server, calls, in_flight, options.threads(), until)
        };
        let run_once = |calls: &Calls| {
            let until = Until {
                time: options.slice(),
                calls: calls.len(),
            };
            load::run(&self.service, calls, in_flight, options.threads(), until)
        };
        let refused = |tokens: Vec<String>| validate(self.caller(), tokens, Code::Unauthenticated);
        match part {
            Part::EchoDefault => run(&self.echo_default, &self.many),
            Part::EchoShared => run(&self.echo_shared, &self.many),
            Part::Echo => run(&self.echo, &self.many),
            Part::One => run(&self.service, &self.one),
            Part::Many => run(&self.service, &self.many),
            Part::ManyOneThread => {
                let server = self.service_one_thread.as_ref();
                run(server.context("started for this part")?, &self.many)
            }
            Part::ApiKeys => run(
                &self.service,
                self.api_keys.as_ref().context("made for this part")?,
            ),
            Part::Cold => {
                let tokens = self.fresh(|index| self.fixture.token(&self.fixture.people[index]))?;
                run_once(&validate(self.caller(), tokens, Code::Ok))
            }
            Part::Garbage => run_once(&refused(self.fresh(|_| garbage())?)),
            Part::Forged => {
                let forged =
                    |index: usize| Ok(forge(&self.fixture.token(&self.fixture.people[index])?));
                run_once(&refused(self.fresh(forged)?))
            }
            Part::Expired => {
                let expired =
                    |index: usize| self.fixture.expired_token(&self.fixture.people[index]);
                run_once(&refused(self.fresh(expired)?))
            }
            Part::Quota => run(&self.service, &self.quota),
            Part::H2load => unreachable!("not a row"),
        }
    }

    fn caller(&self) -> Option<&str> {
        Some(&self.fixture.service_key)
    }

    /// Tokens that no server has seen, of people in turn.
    fn fresh(
        &self,
        mut make: impl FnMut(usize) -> anyhow::Result<String>,
    ) -> anyhow::Result<Vec<String>> {
        let seconds = self.plan.options.slice().as_secs_f64();
        let count = (FRESH_TOKENS_PER_SECOND * seconds) as usize;
        let next = || {
            let next = &self.next_person;
            next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % self.fixture.people.len()
        };
        (0..count.max(1)).map(|_| make(next())).collect()
    }

    /// Our generator and h2load in turns, with one body, as h2load can.
    fn check_generator(&self) -> anyhow::Result<Panel> {
        let options = &self.plan.options;
        let total = self.plan.in_flight.iter().copied().max().unwrap_or(32);
        let in_flight = InFlight::new(total, self.plan.connections);
        let title = format!("our generator against h2load, {total} in flight, one token");
        eprintln!("==> {title}");
        let body = tempfile::NamedTempFile::new()?;
        let theirs = |server: &Server, body: &Path| {
            let (threads, time) = (options.threads(), options.slice());
            h2load::run(server, &self.one, in_flight, threads, time, body)
        };
        let ours = |server: &Server| {
            let until = Until::time(options.slice());
            load::run(server, &self.one, in_flight, options.threads(), until)
        };
        let mut rows = [
            Row::new("ours-echo", "no-op echo, ours".to_owned()),
            Row::new("h2load-echo", "no-op echo, h2load".to_owned()),
            Row::new("ours-one", "ValidateToken, ours".to_owned()),
            Row::new("h2load-one", "ValidateToken, h2load".to_owned()),
        ];
        for round in 0..options.rounds() {
            for turn in 0..rows.len() {
                let index = (turn + round) % rows.len();
                let slice = match index {
                    0 => ours(&self.echo),
                    1 => theirs(&self.echo, body.path()),
                    2 => ours(&self.service),
                    _ => theirs(&self.service, body.path()),
                };
                rows[index].rounds.push(slice?);
            }
        }
        Ok(Panel {
            title,
            rows: rows.into(),
        })
    }
}

fn print_check(check: &Panel) {
    println!("\n{}", check.title);
    for (what, ours, theirs) in [
        ("no-op echo", "ours-echo", "h2load-echo"),
        ("ValidateToken", "ours-one", "h2load-one"),
    ] {
        let (Some(ours), Some(theirs)) = (check.row(ours), check.row(theirs)) else {
            continue;
        };
        let rate = |row: &Row| row.spread(Slice::per_second).median;
        let cpu = |row: &Row| row.spread(Slice::cpu_us_per_call).median;
        let own = |row: &Row| row.spread(|s| s.client_cpu_us / s.calls as f64).median;
        let Spread { median, min, max } = ours.ratio(theirs, Slice::per_second);
        println!(
            "  {what:<16} {:>9.0} against {:>9.0} calls/s: {median:.2} × ({min:.2}–{max:.2}); \
             CPU of the server {:.2} against {:.2}, of the client {:.2} against {:.2} µs",
            rate(ours),
            rate(theirs),
            cpu(ours),
            cpu(theirs),
            own(ours),
            own(theirs),
        );
    }
}

fn validate(
    caller: Option<&str>,
    tokens: impl IntoIterator<Item = String>,
    expected: Code,
) -> Calls {
    let messages = tokens.into_iter().map(|token| {
        let request = ValidateTokenRequest {
            token,
            ..ValidateTokenRequest::default()
        };
        request.encode_to_vec()
    });
    Calls::new(VALIDATE, caller, messages, expected)
}

/// Making a key takes a commit, so there are fewer than tokens.
fn api_keys(tokens: usize) -> usize {
    tokens.min(20_000)
}

/// Looks like a token and is none.
fn garbage() -> anyhow::Result<String> {
    let text = random_alphanumeric(490)?;
    Ok(format!(
        "{}.{}.{}",
        &text[..100],
        &text[100..400],
        &text[400..]
    ))
}

/// The token with another signature.
fn forge(token: &str) -> String {
    let (signed, signature) = token.rsplit_once('.').unwrap_or((token, ""));
    let changed = if signature.starts_with('A') { "B" } else { "A" };
    format!(
        "{signed}.{changed}{}",
        signature.get(1..).unwrap_or_default()
    )
}

/// The numbers below `count` in an order without pattern, the same in every run.
fn shuffled(count: usize) -> impl Iterator<Item = usize> {
    let mut order: Vec<usize> = (0..count).collect();
    // xorshift64 (Marsaglia 2003), Fisher–Yates.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for last in (1..count).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order.into_iter()
}
