//! What retention drops, what it keeps, and whom it gives way to.

use std::time::{Duration, Instant};

use chrono::Utc;
use futures_util::future::join_all;
use tokio_postgres::{Client, NoTls};
use tollkeeper::{model::Period, proto::tollkeeper::usage::v1::UsageEvent};

use super::event;
use crate::{
    harness::{RunningServer, TestApp, eventually},
    ops::scrape,
};

/// Whoever writes while a drop is tried may wait so long: far less than a reader that stays.
const HELD_UP: Duration = Duration::from_secs(3);

fn months_ago(months: u32) -> Period {
    Period::containing(Utc::now()).minus_months(months)
}

fn partition(month: Period) -> String {
    format!("usage_records_{}", month.to_string().replace('-', "_"))
}

/// Books an event of a month that is too long ago to be sent.
async fn book(app: &TestApp, user_id: &str, month: Period) {
    let partition = partition(month);
    for statement in [
        format!(
            "CREATE TABLE IF NOT EXISTS {partition} PARTITION OF usage_records
                 FOR VALUES IN ('{month}')"
        ),
        format!(
            "INSERT INTO usage_records VALUES ('{month}', '{user_id}', gen_random_uuid(),
                 '{month}-15', 'gpt-x', 7, 1, 0, 0, 0)"
        ),
        format!(
            "INSERT INTO monthly_model_usage
                 VALUES ('{user_id}', '{month}', 'gpt-x', 7, 1, 0, 0, 0, 1)"
        ),
    ] {
        app.sql(&statement).await;
    }
}

/// A further server, which keeps so many months; its first upkeep comes at once.
async fn replica(app: &TestApp, retention_months: u32) -> RunningServer {
    let mut settings = app.settings().clone();
    settings.usage.retention_months = retention_months;
    RunningServer::start(&settings).await.unwrap()
}

async fn metric(server: &RunningServer, name: &str) -> f64 {
    let address = server.ops_address.expect("no test turns it off");
    scrape(address).await[&format!("tollkeeper_{name}")]
}

async fn runs(server: &RunningServer, result: &str) -> f64 {
    metric(
        server,
        &format!(r#"upkeep_runs_total{{result="{result}"}}"#),
    )
    .await
}

async fn upkeep_done(server: &RunningServer) {
    eventually("upkeep is done", async || {
        runs(server, "succeeded").await == 1.0
    })
    .await;
}

async fn is_there(app: &TestApp, month: Period) -> bool {
    let partition = partition(month);
    let exists = format!("SELECT count(to_regclass('{partition}'))");
    app.count(&exists).await == 1
}

/// Somebody who reads all records and does not end.
async fn long_reader(app: &TestApp) -> Client {
    let connected = tokio_postgres::connect(&app.database_url, NoTls).await;
    let (reader, connection) = connected.unwrap();
    tokio::spawn(connection);
    let read = "BEGIN; SELECT count(*) FROM usage_records";
    reader.batch_execute(read).await.unwrap();
    reader
}

/// Books the event, again and again, while the upkeep of `server` tries.
async fn writers_go_on_until_it_gives_up(
    app: &TestApp,
    server: &RunningServer,
    event: &UsageEvent,
) {
    let mut longest = Duration::ZERO;
    loop {
        let begun = Instant::now();
        app.record(event).await.unwrap();
        longest = longest.max(begun.elapsed());
        assert!(longest < HELD_UP, "a writer was held up for {longest:?}");
        if runs(server, "failed").await > 0.0 {
            break;
        }
    }
    println!("longest wait of a writer: {longest:?}");
    assert_eq!(runs(server, "succeeded").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_reader_keeps_no_server_from_starting_and_no_writer_from_booking() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let ahead = Period::containing(Utc::now()).plus_months(3);
    upkeep_done(app.running()).await;
    app.sql(&format!("DROP TABLE {}", partition(ahead))).await;
    let reader = long_reader(&app).await;
    let begun = Instant::now();
    let making = replica(&app, 0).await;
    assert!(begun.elapsed() < HELD_UP, "{:?}", begun.elapsed());
    // Replays: they read all partitions.
    writers_go_on_until_it_gives_up(&app, &making, &event(&user.id)).await;
    assert_eq!(metric(&making, "partitions_ahead").await, 2.0);
    reader.batch_execute("COMMIT").await.unwrap();
    let making = replica(&app, 0).await;
    upkeep_done(&making).await;
    assert_eq!(metric(&making, "partitions_ahead").await, 3.0);
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_past_their_retention_go_and_sums_stay() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    let months = [1, 2, 3, 4, 5, 24].map(months_ago);
    for month in months {
        book(&app, &user.id, month).await;
    }
    let keeps_all = replica(&app, 0).await;
    upkeep_done(&keeps_all).await;
    app.assert_books_balance(7).await;

    let keeps_three = replica(&app, 3).await;
    upkeep_done(&keeps_three).await;
    assert_eq!(metric(&keeps_three, "partitions_dropped_total").await, 3.0);
    assert_eq!(metric(&keeps_all, "partitions_dropped_total").await, 0.0);
    for (month, stays) in months
        .into_iter()
        .zip([true, true, true, false, false, false])
    {
        assert_eq!(is_there(&app, month).await, stays, "{month}");
        let totals = app
            .month(&user.id, &month.to_string())
            .await
            .totals
            .unwrap();
        assert_eq!(
            (totals.total_tokens, totals.request_count),
            (8, 1),
            "{month}"
        );
        let models = app.month(&user.id, &month.to_string()).await.models;
        assert_eq!(models.len(), 1, "{month}");
    }
    let left = "SELECT count(*) FROM usage_records";
    assert_eq!(app.count(left).await, 4);
    app.record(&event(&user.id)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn several_replicas_at_once_drop_each_month_once() {
    const OLD: u32 = 20;
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for ago in 4..4 + OLD {
        book(&app, &user.id, months_ago(ago)).await;
    }
    let replicas = join_all((0..3).map(|_| replica(&app, 3))).await;
    let mut dropped = 0.0;
    for replica in &replicas {
        upkeep_done(replica).await;
        assert_eq!(runs(replica, "failed").await, 0.0);
        dropped += metric(replica, "partitions_dropped_total").await;
    }
    assert_eq!(dropped, f64::from(OLD));
    assert_eq!(app.count("SELECT count(*) FROM usage_records").await, 0);
    let sums = "SELECT count(*) FROM monthly_usage";
    assert_eq!(app.count(sums).await, i64::from(OLD));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_gives_way_to_a_long_reader_and_holds_no_writer_up() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let old = months_ago(4);
    book(&app, &user.id, old).await;
    let reader = long_reader(&app).await;

    let dropping = replica(&app, 3).await;
    writers_go_on_until_it_gives_up(&app, &dropping, &event(&user.id)).await;
    assert!(is_there(&app, old).await);
    let age = metric(&dropping, "upkeep_age_seconds").await;
    assert!(age.is_infinite(), "{age}");

    reader.batch_execute("COMMIT").await.unwrap();
    let dropping = replica(&app, 3).await;
    upkeep_done(&dropping).await;
    assert!(!is_there(&app, old).await);
    let age = metric(&dropping, "upkeep_age_seconds").await;
    assert!((0.0..60.0).contains(&age), "{age}");
    app.record(&event(&user.id)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn months_ahead_and_rows_without_a_month_are_shown() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    upkeep_done(app.running()).await;
    assert_eq!(metric(app.running(), "partitions_ahead").await, 3.0);
    assert_eq!(metric(app.running(), "partition_default_rows").await, 0.0);
    let far = Period::containing(Utc::now()).plus_months(7);
    let (month, id) = (far.to_string(), &user.id);
    for _ in 0..2 {
        app.sql(&format!(
            "INSERT INTO usage_records VALUES ('{month}', '{id}', gen_random_uuid(),
                 '{month}-15', 'gpt-x', 7, 1, 0, 0, 0)"
        ))
        .await;
    }
    let replica = replica(&app, 3).await;
    upkeep_done(&replica).await;
    assert_eq!(metric(&replica, "partition_default_rows").await, 2.0);
}
