//! Part `envoy`: what asking this service adds to a real gateway, beside asking one that answers at
//! once; and its rate limits beside a counter in memory.

mod gateway;
mod noop;

use std::{cell::RefCell, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use prost::Message as _;
use serde_json::json;
use tokio::runtime::Runtime;
use tollkeeper::proto::{
    envoy::{
        extensions::common::ratelimit::v3::{RateLimitDescriptor, rate_limit_descriptor::Entry},
        service::{
            auth::v3::{
                AttributeContext, CheckRequest,
                attribute_context::{HttpRequest, Request},
                authorization_client::AuthorizationClient,
            },
            ratelimit::v3::{RateLimitRequest, rate_limit_service_client::RateLimitServiceClient},
        },
    },
    tollkeeper::auth::v1::ValidateTokenRequest,
};
use tonic::{Code, transport::Channel};
use uuid::Uuid;

use crate::{
    Options, cores,
    fixture::{Fixture, with_bearer},
    load::{self, Calls, InFlight, Slice, Until},
    process::Server,
    quota::panel,
    report::{self, Chart, Panel, Row, Spread},
    runtime,
};
use gateway::{Behind, Gateway};
pub(crate) use noop::serve as serve_noop;

/// What the application behind the gateway answers: the echo.
const APP: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
const LIMIT: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";

const CONNECTIONS: usize = 8;
/// What must be left, or is held.
const TOKENS: u64 = 100;
/// Fewer than a server keeps at a time, of all turns together.
const MAX_HOLDS: usize = 800_000;

/// Nobody reaches the limit, but everybody has one.
const TIERS: &str = "
default = \"free\"

[[tier]]
name = \"free\"
monthly_tokens = 1000000000
";

pub(crate) struct Plan {
    pub(crate) options: Options,
    pub(crate) in_flight: Vec<usize>,
    pub(crate) users: usize,
    pub(crate) envoy: PathBuf,
}

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let options = &plan.options;
    let runtime = runtime()?;
    eprintln!("==> filling a database with {} users", plan.users);
    let fixture = runtime.block_on(Fixture::start(&options.service, plan.users, None))?;
    let measured = measure(plan, &fixture, &runtime);
    runtime.block_on(fixture.close())?;
    let Measured {
        through,
        limits,
        answering,
    } = measured?;
    let json_of = |panels: &[Panel], base| -> Vec<_> {
        panels.iter().map(|panel| panel.json(base)).collect()
    };
    let cost: Vec<_> = through.iter().map(|panel| cost(panel).json()).collect();
    let per_core: Vec<_> = limits.iter().map(|panel| per_core(panel).json()).collect();
    let result = json!({
        "cores": cores(), "rounds": options.rounds(), "users": plan.users,
        "slice_seconds": options.slice().as_secs_f64(), "client_threads": options.threads(),
        "through": json_of(&through, "noop"), "cost_against_noop": cost,
        "answering_cpu_us": answering,
        "limits": json_of(&limits, "memory"), "limits_per_core_against_memory": per_core,
    });
    let folder = &options.results;
    report::write_json(folder, "envoy", &result)?;
    let title = format!(
        "Requests through a gateway, {} cores for client, gateway and all behind it",
        cores()
    );
    let chart = Chart {
        title: &title,
        base: "noop",
        base_title: "the same filters answered by a no-op",
        cpu_of: "gateway and who answers it, per request",
        unit: "requests",
        grey: &["plain", "noop"],
    };
    report::write_chart(folder, "envoy", &chart, &through)?;
    let title = format!("Rate limits, {} cores for client and server", cores());
    let chart = Chart {
        title: &title,
        base: "memory",
        base_title: "a counter in memory on tonic's default runtime",
        cpu_of: "the server per call",
        unit: "calls",
        grey: &["memory", "noop"],
    };
    report::write_chart(folder, "envoy-limits", &chart, &limits)?;
    println!(
        "written to {0}/envoy.json, {0}/envoy.svg and {0}/envoy-limits.svg",
        folder.display()
    );
    let panels = through.iter().chain(&limits);
    report::ensure_expected(panels.flat_map(|panel| &panel.rows))
}

/// By how many times fewer requests pass when the service answers instead of the no-op.
fn cost(panel: &Panel) -> Spread {
    ratio(panel, "noop", "service", Slice::per_second)
}

/// Rate limits for each second of processor time of the server, as a multiple of the counter's.
fn per_core(panel: &Panel) -> Spread {
    ratio(panel, "memory", "check", Slice::cpu_us_per_call)
}

fn ratio(panel: &Panel, of: &str, to: &str, by: fn(&Slice) -> f64) -> Spread {
    let rows = panel.row(of).zip(panel.row(to));
    rows.map_or_else(|| Spread::of([]), |(of, to)| of.ratio(to, by))
}

struct Measured {
    through: Vec<Panel>,
    limits: Vec<Panel>,
    /// Processor time of who answers the filters, for each panel.
    answering: Vec<serde_json::Value>,
}

fn measure(plan: &Plan, fixture: &Fixture, runtime: &Runtime) -> anyhow::Result<Measured> {
    let stage = Stage::set(plan, fixture, runtime)?;
    let (mut through, mut limits, mut answering) = (Vec::new(), Vec::new(), Vec::new());
    for &in_flight in &plan.in_flight {
        let (panel, [noop, service]) = stage.through(in_flight)?;
        panel.print_with("noop", "plain", "× no-op", "× none");
        let Spread { median, min, max } = cost(&panel);
        println!("  filters answered here cost {median:.3} × the no-op's ({min:.3}–{max:.3})");
        println!(
            "  CPU µs of who answers, two calls for a request: no-op {:.1}, Tollkeeper {:.1}",
            noop.median, service.median
        );
        answering.push(json!({"noop": noop.json(), "service": service.json()}));
        through.push(panel);
    }
    for &in_flight in &plan.in_flight {
        let panel = stage.limits(in_flight)?;
        panel.print_with("memory", "noop", "× mem.", "× no-op");
        let Spread { median, min, max } = per_core(&panel);
        println!("  checks per core: {median:.2} × the counter in memory ({min:.2}–{max:.2})");
        limits.push(panel);
    }
    Ok(Measured {
        through,
        limits,
        answering,
    })
}

/// All that is up while the turns go round.
struct Stage<'a> {
    plan: &'a Plan,
    gateway: Gateway,
    _app: Server,
    noop: Server,
    memory: Server,
    service: Server,
    /// What clients send through the gateway, each as somebody else.
    requests: Calls,
    check: Calls,
    count: Calls,
    reserve: Calls,
}

impl<'a> Stage<'a> {
    fn set(plan: &'a Plan, fixture: &Fixture, runtime: &Runtime) -> anyhow::Result<Self> {
        let me = std::env::current_exe()?;
        let tokens = fixture.people.iter().map(|person| fixture.token(person));
        let tokens: Vec<String> = tokens.collect::<anyhow::Result<_>>()?;
        let users: Vec<_> = fixture.people.iter().map(|p| p.user.to_string()).collect();
        let first = tokens.first().zip(users.first());
        let (token, user) = first.context("one user at least")?;
        runtime.block_on(fixture.sql("UPDATE users SET tier = 'free'"))?;
        runtime.block_on(fixture.sql("VACUUM ANALYZE users"))?;
        let tiers = fixture.folder().join("tiers.toml");
        fs::write(&tiers, TIERS)?;
        let tiers = tiers.to_string_lossy();
        let service = fixture.serve("service", &[("TOLLKEEPER_USAGE_TIERS_FILE", &tiers)])?;

        let key = fixture.service_key.as_str();
        let all = |message: &dyn Fn(&String) -> Vec<u8>| {
            let messages: Vec<_> = users.iter().map(message).collect();
            Calls::new(LIMIT, Some(key), messages, Code::Ok).drawn_at_random()
        };
        let check = all(&|user| checks(user).encode_to_vec());
        let count = all(&|user| counts(user).encode_to_vec());
        let (model, people) = ("a-model".to_owned(), users.clone());
        let hold = move |user: &str| {
            let id = Uuid::now_v7().to_string();
            let wanted = [("op", "reserve"), ("user", user)];
            let named = [("model", model.as_str()), ("request_id", &id)];
            asks(&[wanted, named].concat(), Some(TOKENS)).encode_to_vec()
        };
        let known: Vec<_> = users.iter().map(|user| hold(user)).collect();
        let reserve = Calls::fresh(
            LIMIT,
            Some(key),
            move |call| hold(&people[load::scattered(call) % people.len()]),
            Code::Ok,
        );

        eprintln!("==> every user and token once, so that no turn begins cold");
        // In turn: drawn at random, a third would be left out.
        let asked = tokens.iter().map(|token| asks_about(token).encode_to_vec());
        let asked = Calls::new(CHECK, Some(key), asked, Code::Ok);
        let hold_once = Calls::new(LIMIT, Some(key), known, Code::Ok);
        for calls in [&asked, &hold_once] {
            warm_up(&service, calls)?;
        }

        let (checked, limited) = runtime.block_on(answers(&service, key, token, user))?;
        let app = Server::echo(&me, &["echo", "--shape", "workers"])?;
        let noop = ["envoy-noop", "--check", &checked, "--limit", &limited];
        let noop = Server::echo(&me, &noop)?;
        let behind = Behind {
            app: app.address,
            noop: noop.address,
            service: service.address,
        };
        let requests = ValidateTokenRequest {
            token: "x".repeat(200),
            ..ValidateTokenRequest::default()
        };
        Ok(Self {
            plan,
            gateway: Gateway::start(&plan.envoy, fixture.folder(), key, &behind)?,
            _app: app,
            noop,
            memory: Server::echo(&plan.options.echo, &["limits"])?,
            service,
            requests: Calls::new(APP, None, [requests.encode_to_vec()], Code::Ok).by(tokens),
            check,
            count,
            reserve,
        })
    }

    /// The gateway with each kind of filters; and the processor time of who answers them, a request,
    /// which says more than the sum where others use the machine: the no-op's and the service's.
    fn through(&self, total: usize) -> anyhow::Result<(Panel, [Spread; 2])> {
        let Self {
            gateway,
            noop,
            service,
            ..
        } = self;
        let options = &self.plan.options;
        let in_flight = InFlight::new(total, CONNECTIONS);
        let rows = vec![
            Row::new("plain", "no filters".to_owned()),
            Row::new("noop", "ext_authz and ratelimit, a no-op".to_owned()),
            Row::new("service", "ext_authz and ratelimit, Tollkeeper".to_owned()),
        ];
        let title = format!("requests through the gateway, {total} in flight");
        let answering = RefCell::new([const { Vec::new() }; 3]);
        let panel = panel(options, title, rows, |index| {
            let (address, answers) = match index {
                0 => (gateway.plain, None),
                1 => (gateway.noop, Some(noop)),
                _ => (gateway.service, Some(service)),
            };
            let of_answers = || answers.map_or(Ok(Duration::ZERO), Server::cpu);
            let cpu = || Ok(gateway.cpu()? + of_answers()?);
            let (threads, until) = (options.threads(), Until::time(options.slice()));
            let before = of_answers()?;
            let slice = load::run_at(address, cpu, &self.requests, in_flight, threads, until)?;
            let spent = (of_answers()? - before).as_secs_f64() * 1e6;
            answering.borrow_mut()[index].push(spent / slice.calls as f64);
            Ok(slice)
        })?;
        let [_, noop, service] = answering.into_inner();
        // The first turn of each was before the rounds.
        let spread = |turns: Vec<f64>| Spread::of(turns.into_iter().skip(1));
        Ok((panel, [spread(noop), spread(service)]))
    }

    /// Rate limits, without a gateway.
    fn limits(&self, total: usize) -> anyhow::Result<Panel> {
        let options = &self.plan.options;
        let in_flight = InFlight::new(total, CONNECTIONS);
        let rows = vec![
            Row::new(
                "memory",
                "a counter in memory, default tonic build".to_owned(),
            ),
            Row::new("noop", "a no-op, our build, thread per core".to_owned()),
            Row::new("check", "op check".to_owned()),
            Row::new("reserve", "op reserve".to_owned()),
        ];
        let time = Until::time(options.slice());
        // What it holds, it holds for minutes.
        let while_holding = Until {
            calls: MAX_HOLDS.saturating_sub(2 * self.plan.users)
                / ((options.rounds() + 1) * self.plan.in_flight.len()),
            ..time
        };
        let title = format!("ShouldRateLimit, {total} in flight");
        panel(options, title, rows, |index| {
            let (server, calls, until) = match index {
                0 => (&self.memory, &self.count, time),
                1 => (&self.noop, &self.check, time),
                2 => (&self.service, &self.check, time),
                _ => (&self.service, &self.reserve, while_holding),
            };
            load::run(server, calls, in_flight, options.threads(), until)
        })
    }
}

/// Sends all calls until all are answered: a burst of users never seen may take longer than anybody
/// waits.
fn warm_up(service: &Server, calls: &Calls) -> anyhow::Result<()> {
    // Many at once, so that many leases are had in one transaction.
    let in_flight = InFlight::new(1_024, CONNECTIONS);
    let until = Until {
        time: Duration::from_secs(120),
        calls: calls.len(),
    };
    for _ in 0..10 {
        let slice = load::run(service, calls, in_flight, 1, until)?;
        if slice.wrong == 0 {
            return Ok(());
        }
    }
    bail!("some are never answered: {}", service.complaints())
}

/// What the service answers to both questions, encoded.
async fn answers(
    service: &Server,
    key: &str,
    token: &str,
    user: &str,
) -> anyhow::Result<(String, String)> {
    let url = format!("http://{}", service.address);
    let channel = Channel::from_shared(url)?.connect().await?;
    let request = with_bearer(asks_about(token), key)?;
    let mut client = AuthorizationClient::new(channel.clone());
    let checked = client.check(request).await?.into_inner();
    let admitted = checked
        .status
        .as_ref()
        .is_some_and(|status| status.code == 0);
    ensure!(admitted, "not admitted: {checked:?}");
    let request = with_bearer(checks(user), key)?;
    let mut client = RateLimitServiceClient::new(channel);
    let limited = client.should_rate_limit(request).await?.into_inner();
    ensure!(limited.overall_code == 1, "over limit: {limited:?}");
    Ok((
        STANDARD.encode(checked.encode_to_vec()),
        STANDARD.encode(limited.encode_to_vec()),
    ))
}

/// As the gateway asks.
fn asks_about(token: &str) -> CheckRequest {
    let headers = [
        (":authority", "127.0.0.1:10000"),
        (":method", "POST"),
        (":path", APP),
        (":scheme", "http"),
        ("authorization", &format!("Bearer {token}")),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("user-agent", "tollkeeper-bench"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-request-id", "01934567-89ab-7def-8123-456789abcdef"),
    ];
    CheckRequest {
        attributes: Some(AttributeContext {
            request: Some(Request {
                http: Some(HttpRequest {
                    headers: headers
                        .map(|(name, value)| (name.to_owned(), value.to_owned()))
                        .into(),
                    ..HttpRequest::default()
                }),
            }),
            ..AttributeContext::default()
        }),
    }
}

fn checks(user: &str) -> RateLimitRequest {
    asks(&[("op", "check"), ("user", user)], Some(TOKENS))
}

/// The same to a counter, of which each counts once.
fn counts(user: &str) -> RateLimitRequest {
    asks(&[("op", "check"), ("user", user)], None)
}

fn asks(entries: &[(&str, &str)], hits_addend: Option<u64>) -> RateLimitRequest {
    let entry = |(key, value): &(&str, &str)| Entry {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
    };
    RateLimitRequest {
        descriptors: vec![RateLimitDescriptor {
            entries: entries.iter().map(entry).collect(),
            hits_addend,
            ..RateLimitDescriptor::default()
        }],
        ..RateLimitRequest::default()
    }
}
