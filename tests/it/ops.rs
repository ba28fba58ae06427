//! The operations port, read as a machine reads it: over HTTP.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tollkeeper::{
    grpc::probe,
    proto::tollkeeper::{auth::v1::LoginRequest, usage::v1::ReserveQuotaRequest},
    server::ServerError,
};

use crate::{
    auth::python::python,
    harness::{TestApp, eventually, validate_through},
    usage::{
        event,
        reservations::{Client, wish},
    },
};

const OK_CALLS: &str = r#"tollkeeper_grpc_requests_total{service="tollkeeper.auth.v1.AuthService",method="ValidateToken",code="Ok"}"#;

/// Status and body of a GET.
async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

/// The series and their values.
pub(crate) async fn scrape(address: SocketAddr) -> BTreeMap<String, f64> {
    let (status, text) = get(address, "/metrics").await;
    assert_eq!(status, 200);
    assert!(text.ends_with("# EOF\n"), "{text}");
    let series = text.lines().filter(|line| !line.starts_with('#'));
    series
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

fn value(series: &BTreeMap<String, f64>, name: &str) -> f64 {
    let name = format!("tollkeeper_{name}");
    *series
        .get(&name)
        .unwrap_or_else(|| panic!("no {name} in {series:#?}"))
}

async fn feed_is(app: &TestApp, state: &str) -> bool {
    let name = format!(r#"change_feed_state{{state="{state}"}}"#);
    value(&scrape(app.ops_address).await, &name) == 1.0
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_counted_exactly_by_their_codes_whichever_way_they_take() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    for _ in 0..20 {
        app.validate(&token).await.unwrap();
    }
    for _ in 0..3 {
        app.validate("garbage").await.unwrap_err();
    }
    let series = scrape(app.ops_address).await;
    assert_eq!(series[OK_CALLS], 20.0);
    assert_eq!(
        series[&OK_CALLS.replace("\"Ok\"", "\"Unauthenticated\"")],
        3.0
    );
    let took = r#"grpc_request_duration_seconds_count{service="tollkeeper.auth.v1.AuthService",method="ValidateToken"}"#;
    assert_eq!(value(&series, took), 23.0);
    // The first one read the session; the other good ones came from memory.
    assert_eq!(
        value(&series, r#"credential_lookups_total{result="hit"}"#),
        19.0
    );
    assert_eq!(
        value(&series, "credential_entries"),
        2.0,
        "the token and the caller's key"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_counted_by_what_became_of_them() {
    let app = TestApp::spawn().await;
    let mut event = event(&app.user().create().await.id);
    for _ in 0..3 {
        app.record(&event).await.unwrap();
    }
    event.model.push('!');
    app.record(&event).await.unwrap_err();
    let series = scrape(app.ops_address).await;
    for (outcome, events) in [("recorded", 1.0), ("duplicate", 2.0), ("conflict", 1.0)] {
        let name = format!(r#"usage_events_total{{outcome="{outcome}"}}"#);
        assert_eq!(value(&series, &name), events, "{outcome}");
    }
    assert_eq!(value(&series, "usage_batches_total"), 4.0);
    // The answer may overtake the end of the batch.
    eventually("nothing is left", async || {
        let series = scrape(app.ops_address).await;
        let states =
            ["waiting", "writing"].map(|state| format!(r#"usage_backlog{{state="{state}"}}"#));
        states.iter().all(|name| value(&series, name) == 0.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reservations_are_counted_by_what_became_of_them() {
    let app = TestApp::spawn().await;
    let client = Client::of(&app);
    let user = app.user().create().await.id;
    let late = ReserveQuotaRequest {
        lifetime: Some(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        }),
        ..wish(&user, 1)
    };
    let late = client.reserve(late).await.unwrap();
    client.reserve(wish(&user, 8_001)).await.unwrap_err();
    for _ in 0..13 {
        client.hold(&user, 7_500).await;
    }
    client.reserve(wish(&user, 8_000)).await.unwrap_err();
    let expired = late.expires_at.unwrap();
    eventually("it has expired", async || {
        chrono::Utc::now().timestamp() > expired.seconds + 1
    })
    .await;
    client.commit(&late.reservation, 1).await.unwrap();
    let mut held = 14.0;
    while client.reserve(wish(&user, 1)).await.is_ok() {
        held += 1.0;
    }
    let series = scrape(app.ops_address).await;
    for (outcome, answers) in [
        ("held", held),
        ("beyond_limit", 0.0),
        ("denied", 1.0),
        ("rate_limited", 1.0),
        ("oversized", 1.0),
    ] {
        let name = format!(r#"reservations_total{{outcome="{outcome}"}}"#);
        assert_eq!(value(&series, &name), answers, "{outcome}");
    }
    for (kind, commits) in [("accepted", 0.0), ("late", 1.0)] {
        let name = format!(r#"reservation_commits_total{{kind="{kind}"}}"#);
        assert_eq!(value(&series, &name), commits, "{kind}");
    }
    assert_eq!(value(&series, "reservation_commits_waiting"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_called_has_series_and_none_of_them_names_anybody() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    app.validate(&token).await.unwrap();
    let request = LoginRequest {
        identifier: user.email.clone(),
        password: "wrong, and long enough".to_owned(),
    };
    app.auth("").login(request).await.unwrap_err();
    let (_, text) = get(app.ops_address, "/metrics").await;
    assert!(!text.contains("method=\"DisableUser\""), "{text}");
    for secret in [
        &token,
        &user.email,
        &user.username,
        &user.id,
        &app.service_key,
    ] {
        assert!(!text.contains(secret.as_str()), "{secret} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_openmetrics_to_the_letter() {
    let app = TestApp::spawn().await;
    app.validate("garbage").await.unwrap_err();
    let (_, text) = get(app.ops_address, "/metrics").await;
    let script = "
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read
print(json.dumps({family.name: family.type for family in read(json.load(sys.stdin))}))";
    let families = python(script, &json!(text));
    for (name, kind) in [
        ("grpc_request_duration_seconds", "histogram"),
        ("grpc_requests", "counter"),
        ("credential_entries", "gauge"),
    ] {
        assert_eq!(families[format!("tollkeeper_{name}")], kind);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_the_change_feed_shows_in_metrics_and_in_health() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.auth.staleness_bound = Duration::from_millis(400);
        settings.auth.max_stale = Duration::from_secs(2);
    })
    .await;
    let url = format!("http://{}", app.address);
    let second = Duration::from_secs(1);
    let feed = async || probe(&url, "tollkeeper.ChangeFeed", second).await;
    eventually("it is live", async || feed_is(&app, "live").await).await;
    eventually("health says so", async || feed().await.is_ok()).await;
    let flushes = r#"changes_total{kind="flush"}"#;
    let before = value(&scrape(app.ops_address).await, flushes);

    proxy.pause_feed();
    eventually("it is stale", async || feed_is(&app, "stale").await).await;
    eventually("health says so", async || feed().await.is_err()).await;
    probe(&url, "", second)
        .await
        .expect("the database still answers");
    eventually("it is lost", async || feed_is(&app, "lost").await).await;
    let age = value(&scrape(app.ops_address).await, "change_feed_age_seconds");
    assert!(age > 2.0, "{age}");

    proxy.resume();
    eventually("it is live again", async || feed_is(&app, "live").await).await;
    eventually("health says so", async || feed().await.is_ok()).await;
    assert!(value(&scrape(app.ops_address).await, flushes) > before);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_from_memory_while_the_database_is_away_are_counted() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.auth.staleness_bound = Duration::from_millis(400);
    })
    .await;
    // What is read before nothing was heard yet does not last.
    eventually("the feed is live", async || feed_is(&app, "live").await).await;
    let token = app.login(&app.user().create().await).await.access_token;
    let key = app.service_key.clone();
    validate_through(&app.channel, &key, &token).await.unwrap();
    proxy.cut();
    eventually("memory answers", async || {
        validate_through(&app.channel, &key, &token).await.unwrap();
        value(&scrape(app.ops_address).await, "outage_answers_total") > 0.0
    })
    .await;
    eventually("it is not ready", async || {
        get(app.ops_address, "/readyz").await == (503, "the database does not answer\n".to_owned())
    })
    .await;
    assert_eq!(get(app.ops_address, "/livez").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_tell_a_server_that_serves_from_one_that_drains() {
    let app = TestApp::spawn_with(|settings| {
        settings.server.drain_delay = Duration::from_secs(3);
        // Of its own: elsewhere another test may be given the port once it is free.
        settings.ops.listen = Some(SocketAddr::from(([127, 0, 0, 2], 0)));
    })
    .await;
    let ops = app.ops_address;
    eventually("it is ready", async || {
        get(ops, "/readyz").await == (200, "serving\n".to_owned())
    })
    .await;
    assert_eq!(get(ops, "/livez").await, (200, "alive\n".to_owned()));
    assert_eq!(get(ops, "/").await.0, 404);
    let stopping = tokio::spawn(app.stop());
    eventually("it drains", async || {
        get(ops, "/readyz").await == (503, "shutting down\n".to_owned())
    })
    .await;
    assert_eq!(get(ops, "/livez").await.0, 200);
    stopping.await.unwrap().unwrap();
    TcpStream::connect(ops)
        .await
        .expect_err("closed at the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_refused_in_production_and_done_without_in_dev_mode() {
    use crate::harness::RunningServer;

    let app = TestApp::spawn().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut settings = app.settings().clone();
    settings.ops.listen = Some(taken.local_addr().unwrap());
    let without = RunningServer::start(&settings).await.expect("it starts");
    assert_eq!(without.ops_address, None);
    settings.dev = false;
    let refused = RunningServer::start(&settings)
        .await
        .err()
        .expect("refused");
    assert!(
        matches!(refused, ServerError::ListenForOps { .. }),
        "{refused}"
    );
}
