//! Part `layers`: what each layer adds to a call, in this process and without a network.
//!
//! The same `ValidateToken` goes through the service's own stack, built up layer by layer. One
//! thread, one call at a time, so the figures are processor time.

use std::{
    convert::Infallible,
    io,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use serde_json::json;
use tokio::{sync::watch, time::sleep};
use tollkeeper::{
    auth::{KeyRing, MasterKey, Trust},
    clock::BootTime,
    config::{DatabaseSettings, Secret, Settings, SigningAlgorithm},
    grpc::{
        AccessLayer, Afterwards, CallEnd, CallLayer, CallMetrics, MemoryLayer, Rules,
        TrustedProxies, routes,
    },
    proto::{DESCRIPTOR_SET, tollkeeper::auth::v1::ValidateTokenRequest},
    server::Server,
    tasks,
};
use tonic::body::Body;
use tower::{Layer as _, Service, ServiceExt as _, util::BoxCloneService};

use crate::{
    Options,
    echo::Echo,
    fixture::Fixture,
    report::{self, Spread},
    runtime,
};

const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const PEOPLE: usize = 1_000;
const CALLS: usize = 20_000;

type Stack = BoxCloneService<Request<Body>, Response<Body>, Infallible>;

/// One line of the table.
struct Row {
    part: &'static str,
    title: &'static str,
    stack: Stack,
    /// Whether spans and events are recorded, as in production.
    logs: bool,
    ns: Vec<f64>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let fixture = runtime.block_on(Fixture::start(&options.service, PEOPLE, None))?;
    let measured = measure(options, &fixture, &runtime);
    runtime.block_on(fixture.close())?;
    let rows = measured?;
    let median = |row: &Row| Spread::of(row.ns.iter().copied());
    println!("\nProcessor time of a ValidateToken of a known token, without network");
    println!("  {:<58} {:>8} {:>15} {:>8}", "", "ns", "spread", "adds");
    let mut before = None;
    for row in &rows {
        let Spread { median, min, max } = median(row);
        let adds = before.map_or_else(String::new, |before: f64| {
            format!("{:+.0}", median - before)
        });
        println!(
            "  {:<58} {median:>8.0} {:>15} {adds:>8}",
            row.title,
            format!("{min:.0}–{max:.0}")
        );
        before = Some(median);
    }
    let rows: Vec<_> = rows
        .iter()
        .map(|row| json!({"part": row.part, "title": row.title, "ns": median(row).json()}))
        .collect();
    report::write_json(
        &options.results,
        "layers",
        &json!({"rounds": options.rounds(), "calls": CALLS, "rows": rows}),
    )?;
    println!("written to {}/layers.json", options.results.display());
    Ok(())
}

fn measure(
    options: &Options,
    fixture: &Fixture,
    background: &tokio::runtime::Runtime,
) -> anyhow::Result<Vec<Row>> {
    let (mut rows, _feed) = background.block_on(rows(fixture))?;
    let tokens: Vec<_> = fixture
        .people
        .iter()
        .map(|person| fixture.token(person))
        .collect::<anyhow::Result<_>>()?;
    let bodies: Vec<_> = tokens.iter().map(|token| framed(token)).collect();
    let caller = format!("Bearer {}", fixture.service_key);
    // The database answers on the other runtime; nothing else runs on this one.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    for round in 0..=options.rounds() {
        for row in &mut rows {
            let calls = calls(row.stack.clone(), &bodies, &caller);
            let took = if row.logs {
                let subscriber = tracing_subscriber::fmt()
                    .with_env_filter("info")
                    .with_writer(io::sink)
                    .json()
                    .finish();
                tracing::subscriber::with_default(subscriber, || runtime.block_on(calls))
            } else {
                runtime.block_on(calls)
            }?;
            // The first round fills the memory.
            if round > 0 {
                row.ns.push(took.as_nanos() as f64 / CALLS as f64);
            }
        }
    }
    Ok(rows)
}

/// The stacks, innermost first, and what keeps their memory fresh.
async fn rows(fixture: &Fixture) -> anyhow::Result<(Vec<Row>, tokio::task::JoinHandle<()>)> {
    let mut settings = Settings {
        database: DatabaseSettings {
            url: Secret::new(fixture.database_url()),
            ..DatabaseSettings::default()
        },
        ..Settings::default()
    };
    settings.server.listen = "127.0.0.1:0".parse()?;
    settings.ops.listen = None;
    let keys = KeyRing::from_folder(Path::new(fixture.key_dir()), SigningAlgorithm::EdDsa)?;
    let server = Server::bind(&settings, keys, &MasterKey::new(&[7; 32])).await?;
    let (auth, usage) = (server.auth().clone(), server.usage().clone());
    let feed = tokio::spawn(tasks::change_feed(
        server.store().clone(),
        auth.clone(),
        usage.clone(),
    ));
    let patience = Instant::now() + Duration::from_secs(10);
    while auth.freshness().trust(BootTime::now()) != Trust::Live {
        ensure!(Instant::now() < patience, "the change feed does not start");
        sleep(Duration::from_millis(10)).await;
    }
    let rules = Rules::from_descriptor_set(DESCRIPTOR_SET)?;
    let health = tonic_health::server::HealthService::from_health_reporter(
        tonic_health::server::HealthReporter::new(),
    );
    let max_bytes = settings.server.max_request_bytes;
    let routes = routes(
        auth.clone(),
        usage.clone(),
        health,
        false,
        max_bytes,
        Afterwards::default(),
    )?;
    let (_, cut) = watch::channel(false);
    let metrics = CallMetrics::new(&rules);
    let end = CallEnd::new(Duration::from_secs(30), cut);
    let memory = MemoryLayer::new(
        auth.clone(),
        usage,
        &rules,
        &metrics,
        max_bytes,
        end.clone(),
    );
    let access = AccessLayer::new(auth, rules).layer(routes.clone());
    let proxies = TrustedProxies::new(&[]);
    let call = CallLayer::new(metrics, proxies, end).layer(access.clone());
    let row = |part, title, stack, logs| Row {
        part,
        title,
        stack,
        logs,
        ns: Vec::new(),
    };
    let rows = vec![
        row("echo", "no-op echo", Echo.boxed_clone(), false),
        row(
            "handler",
            "the handler: decode, look up, encode",
            boxed(routes),
            false,
        ),
        row(
            "access",
            "+ access: who calls, may it",
            boxed(access),
            false,
        ),
        row(
            "call",
            "+ request id, metrics, deadline, panic guard, error details",
            boxed(call.clone()),
            false,
        ),
        row(
            "logs",
            "+ span and log filter, as in production",
            boxed(call.clone()),
            true,
        ),
        row(
            "memory",
            "the short way, all of it",
            boxed(memory.layer(call)),
            true,
        ),
    ];
    Ok((rows, feed))
}

fn boxed<S>(stack: S) -> Stack
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    stack.boxed_clone()
}

async fn calls(stack: Stack, bodies: &[Bytes], caller: &str) -> anyhow::Result<Duration> {
    let requests: Vec<_> = (0..CALLS)
        .map(|index| {
            let body = Full::new(bodies[index % bodies.len()].clone());
            Request::post(VALIDATE)
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("authorization", caller)
                .body(Body::new(body))
        })
        .collect::<Result<_, _>>()?;
    let begun = Instant::now();
    for request in requests {
        let response = stack.clone().oneshot(request).await?;
        let answer = response.into_body().collect().await?;
        let trailers = answer.trailers().context("an error")?;
        ensure!(trailers.get("grpc-status").is_some_and(|code| code == "0"));
    }
    Ok(begun.elapsed())
}

fn framed(token: &str) -> Bytes {
    let message = ValidateTokenRequest {
        token: token.to_owned(),
        ..ValidateTokenRequest::default()
    }
    .encode_to_vec();
    let len = u32::try_from(message.len()).expect("a small message");
    [&[0], &len.to_be_bytes()[..], &message].concat().into()
}
