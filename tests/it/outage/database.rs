use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tollkeeper::proto::tollkeeper::auth::v1::ValidateTokenRequest;

use super::*;
use crate::harness::cluster;

/// Ends every connection of the servers under test, as an administrator of Postgres would.
const TERMINATE: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE datname = current_database() AND application_name = 'tollkeeper'";

#[tokio::test(flavor = "multi_thread")]
async fn terminated_connections_cost_a_retry_at_most() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let enough = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..12)
        .map(|_| {
            let (channel, key) = (app.channel.clone(), app.service_key.clone());
            let (user_id, enough) = (user.id.clone(), enough.clone());
            tokio::spawn(async move {
                let (mut events, mut failures) = (Vec::new(), Vec::new());
                while !enough.load(Ordering::Relaxed) {
                    let event = event(&user_id);
                    // The client's side of the contract: the same event until it succeeds.
                    while let Err(status) = record_through(&channel, &key, &event).await {
                        failures.push(status);
                    }
                    events.push(event);
                }
                (events, failures)
            })
        })
        .collect();
    let booked = "SELECT count(*) FROM usage_records";
    let mut hits = 0;
    for round in 1..=10 {
        eventually("the load goes on", async || {
            app.count(booked).await >= round * 20
        })
        .await;
        hits += app.sql(TERMINATE).await.len();
    }
    assert!(hits > 5, "{hits} connections were hit");
    enough.store(true, Ordering::Relaxed);
    let (mut events, mut failures) = (0, Vec::new());
    for load in load {
        let (booked, failed) = load.await.unwrap();
        events += i64::try_from(booked.len()).unwrap();
        failures.extend(failed);
    }
    for status in &failures {
        assert_database_unavailable(status);
    }
    app.assert_books_balance(events).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_that_were_terminated_are_replaced_unnoticed() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let all: Vec<_> = (0..8)
        .map(|_| start_recording(&app, event(&user.id)))
        .collect();
    for call in all {
        call.await.unwrap().unwrap();
    }
    app.sql(TERMINATE).await;
    let alive = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'tollkeeper'
             AND state_change < now() - interval '1 second'";
    eventually("the old are gone", async || app.count(alive).await == 0).await;
    // The news may reach the pool a moment after the server has forgotten the session.
    eventually("calls succeed", async || {
        app.record(&event(&user.id)).await.is_ok()
    })
    .await;
    for _ in 0..20 {
        app.record(&event(&user.id)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_over_its_time_is_unavailable_and_books_nothing() {
    let app = TestApp::spawn_with(|settings| {
        settings.database.statement_timeout = Duration::from_millis(200);
    })
    .await;
    let user = app.user().create().await;
    for table in ["usage_records", "monthly_model_usage"] {
        let blocker = Blocker::lock(&app, table).await;
        let failed = app.record(&event(&user.id)).await.unwrap_err();
        assert_database_unavailable(&failed);
        blocker.release().await;
        app.assert_books_balance(0).await;
    }
    app.record(&event(&user.id)).await.unwrap();
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cancelled_calls_brought_is_booked_and_their_connections_are_free() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let events: Vec<_> = (0..8).map(|_| event(&user.id)).collect();
    for _ in 0..3 {
        let blocker = Blocker::lock(&app, "monthly_model_usage").await;
        let calls: Vec<_> = events
            .iter()
            .map(|event| start_recording(&app, event.clone()))
            .collect();
        blocker.hold_up(&app, 8).await;
        for call in &calls {
            call.abort();
        }
        for call in calls {
            assert!(call.await.unwrap_err().is_cancelled());
        }
        blocker.release().await;
        eventually("all are booked", async || {
            app.count("SELECT count(*) FROM usage_records").await == 8
        })
        .await;
        let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
             AND application_name = 'tollkeeper' AND state <> 'idle'";
        eventually("no transaction is left open", async || {
            app.count(open).await == 0
        })
        .await;
        app.assert_books_balance(8).await;
    }
    for event in &events {
        assert_eq!(app.record(event).await.unwrap(), Outcome::Duplicate);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cancelled_calls_brought_is_booked_by_a_server_that_ends() {
    let app = TestApp::spawn_with(|settings| settings.usage.writers = 1).await;
    let user = app.user().create().await;
    let events: Vec<_> = (0..8).map(|_| event(&user.id)).collect();
    let blocker = Blocker::lock(&app, "monthly_model_usage").await;
    let calls: Vec<_> = events
        .iter()
        .map(|event| start_recording(&app, event.clone()))
        .collect();
    let backlog = || {
        let (waiting, writing) = app.running().usage.backlog();
        waiting + writing
    };
    eventually("all are there", async || backlog() == 8).await;
    for call in &calls {
        call.abort();
    }
    for call in calls {
        assert!(call.await.unwrap_err().is_cancelled());
    }
    let url = app.database_url.clone();
    let ending = tokio::spawn(app.stop());
    // The thread that served them has nobody left, and ends.
    sleep(Duration::from_secs(1)).await;
    assert!(!ending.is_finished(), "it waits for what it was given");
    blocker.release().await;
    ending.await.unwrap().unwrap();
    let client = cluster::connect(&url).await;
    let count = "SELECT count(*), (SELECT sum(request_count)::bigint FROM monthly_usage)
         FROM usage_records";
    let row = client.query_one(count, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (8, 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_cancelled_at_any_moment_book_all_or_nothing() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let events: Vec<_> = (0..60).map(|_| event(&user.id)).collect();
    for (n, event) in (0..).zip(&events) {
        let call = start_recording(&app, event.clone());
        let cancel = timeout(Duration::from_micros(n * 150), async {
            std::future::pending::<()>().await;
        });
        let _ = cancel.await;
        call.abort();
    }
    for event in &events {
        app.record(event).await.unwrap();
    }
    app.assert_books_balance(60).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_ours_shows_nothing_of_its_cause() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.sql("DROP TABLE monthly_model_usage CASCADE").await;
    let failed = app.record(&event(&user.id)).await.unwrap_err();
    assert_eq!(failed.code(), Code::Internal);
    assert_eq!(reason(&failed), "INTERNAL");
    assert_eq!(failed.message(), "internal error");
    assert_tells_nothing(&failed, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_give_up_leave_no_sessions_behind() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let blocker = Blocker::lock(&app, "users").await;
    let sessions = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'tollkeeper'";
    let mut most = 0;
    for _ in 0..12 {
        let calls = (0..16).map(|_| start_changing(&app, &user.id));
        let calls: Vec<_> = calls.collect();
        sleep(Duration::from_millis(100)).await;
        for call in &calls {
            call.abort();
        }
        for call in calls {
            let _ = call.await;
        }
        most = most.max(app.count(sessions).await);
    }
    blocker.release().await;
    // Of a pool of eight; one that is ending may be seen beside its successor.
    assert!(most <= 16, "{most} sessions");
    app.record(&event(&user.id)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_that_are_given_up_end_in_postgres_and_leave_their_turn_to_others() {
    let app = TestApp::spawn_with(|settings| {
        settings.database.statement_timeout = Duration::from_secs(90);
    })
    .await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    let list = |user_id: &str| {
        let request = ListUsageRecordsRequest {
            user_id: user_id.to_owned(),
            ..ListUsageRecordsRequest::default()
        };
        let mut usage = app.usage(&app.service_key);
        tokio::spawn(async move { usage.list_usage_records(request).await })
    };
    let blocker = Blocker::lock(&app, "usage_records").await;
    // A pool of eight lets two read much at a time.
    let calls: Vec<_> = (0..6).map(|_| list(&user.id)).collect();
    blocker.hold_up(&app, 2).await;
    for call in &calls {
        call.abort();
    }
    blocker.let_go(&app).await;
    blocker.release().await;
    let listed = list(&user.id).await.unwrap().unwrap().into_inner();
    assert_eq!(listed.records.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_in_use_is_no_dead_database() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut health = HealthClient::new(app.channel.clone());
    let mut status = async || {
        let request = HealthCheckRequest::default();
        health.check(request).await.unwrap().into_inner().status()
    };
    eventually("serving", async || status().await == ServingStatus::Serving).await;
    let blocker = Blocker::lock(&app, "monthly_model_usage").await;
    let calls = (0..16).map(|_| start_reading(&app, &user.id));
    let calls: Vec<_> = calls.collect();
    blocker.hold_up(&app, 8).await;
    for _ in 0..40 {
        assert_eq!(status().await, ServingStatus::Serving);
        sleep(Duration::from_millis(100)).await;
    }
    blocker.release().await;
    for call in calls {
        let _ = call.await;
    }
}

/// A key with a right checksum that nobody was given.
fn made_up(prefix: &str, number: usize) -> String {
    const ALPHABET: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let body = format!("{prefix}{number:043}");
    let mut rest = crc32fast::hash(body.as_bytes()) as usize;
    let mut checksum = [b'0'; 6];
    for digit in checksum.iter_mut().rev() {
        *digit = ALPHABET[rest % 62];
        rest /= 62;
    }
    format!("{body}{}", str::from_utf8(&checksum).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_made_up_leave_room_in_the_pool() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let blocker = Blocker::lock(&app, "service_keys").await;
    let calls: Vec<_> = (0..64)
        .map(|number| {
            let mut client = app.auth(&made_up("tks_", number));
            tokio::spawn(async move {
                client
                    .validate_token(ValidateTokenRequest::default())
                    .await
                    .map(drop)
            })
        })
        .collect();
    blocker.hold_up(&app, 2).await;
    sleep(Duration::from_millis(300)).await;
    let login = timeout(Duration::from_secs(1), app.login(&user));
    login.await.expect("not behind the others");
    blocker.release().await;
    for call in calls {
        call.await.unwrap().unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_made_up_do_not_keep_known_ones_from_being_read_anew() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    app.validate(&token).await.unwrap();
    let blocker = Blocker::lock(&app, "api_keys").await;
    let calls: Vec<_> = (0..64)
        .map(|number| {
            let auth = app.running().auth.clone();
            let key = made_up("tka_", number);
            tokio::spawn(async move { auth.authenticate(&key, chrono::Utc::now()).await.map(drop) })
        })
        .collect();
    blocker.hold_up(&app, 2).await;
    app.sql("SELECT pg_notify('tollkeeper_changes', 'services')")
        .await;
    sleep(Duration::from_millis(300)).await;
    let answer = timeout(Duration::from_secs(1), app.validate(&token)).await;
    answer.expect("not behind the others").unwrap();
    blocker.release().await;
    for call in calls {
        call.await.unwrap().unwrap_err();
    }
}
