use std::time::Duration;

use tokio::time::Instant;
use tollkeeper::proto::tollkeeper::{
    auth::v1::{GetCurrentUserRequest, GetJwksRequest, LoginRequest, ValidateTokenRequest},
    usage::v1::CheckQuotaRequest,
};

use super::*;
use crate::harness::PASSWORD;

/// What a busy machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_database() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    eventually_reports(&app.channel, ServingStatus::Serving).await;
    for _ in 0..2 {
        proxy.cut();
        eventually_reports(&app.channel, ServingStatus::NotServing).await;
        proxy.resume();
        eventually_reports(&app.channel, ServingStatus::Serving).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_a_database_that_falls_silent() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    eventually_reports(&app.channel, ServingStatus::Serving).await;
    proxy.pause();
    eventually_reports(&app.channel, ServingStatus::NotServing).await;
    proxy.resume();
    eventually_reports(&app.channel, ServingStatus::Serving).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_call_says_that_the_database_is_away() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    proxy.cut();
    for status in failures(&app, &user.id, &token).await {
        assert_database_unavailable(&status);
        assert_tells_nothing(&status, &[proxy.folder(), &user.email]);
    }
    proxy.resume();
    eventually("calls succeed", async || {
        app.record(&event(&user.id)).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_out_of_reach_is_given_up_after_the_acquire_timeout() {
    let acquire_timeout = Duration::from_millis(300);
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.database.acquire_timeout = acquire_timeout;
    })
    .await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    // No connection is left, and new ones lead nowhere.
    proxy.cut();
    eventually_reports(&app.channel, ServingStatus::NotServing).await;
    proxy.pause();
    let started = Instant::now();
    for status in failures(&app, &user.id, &token).await {
        assert_database_unavailable(&status);
    }
    let calls = 5;
    assert!(started.elapsed() < acquire_timeout * calls + SLACK);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_on_connections_that_fell_silent_end_at_their_deadline() {
    let max_deadline = Duration::from_secs(1);
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.server.max_deadline = max_deadline;
        settings.database.acquire_timeout = Duration::from_millis(500);
    })
    .await;
    let user = app.user().create().await;
    let event = event(&user.id);
    app.record(&event).await.unwrap();
    proxy.pause();
    let started = Instant::now();
    let failed = app.record(&event).await.unwrap_err();
    assert!(started.elapsed() < max_deadline + SLACK);
    match failed.code() {
        Code::DeadlineExceeded => assert_eq!(reason(&failed), "DEADLINE_EXCEEDED"),
        _ => assert_database_unavailable(&failed),
    }
    assert_tells_nothing(&failed, &[]);
    proxy.resume();
    eventually("calls succeed", async || {
        app.record(&event)
            .await
            .is_ok_and(|o| o == Outcome::Duplicate)
    })
    .await;
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn public_keys_are_answered_without_a_database() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    proxy.cut();
    eventually_reports(&app.channel, ServingStatus::NotServing).await;
    let keys = app.auth("").get_jwks(GetJwksRequest {}).await.unwrap();
    assert_eq!(keys.into_inner().keys.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_cut_under_load_loses_and_doubles_nothing() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    let user = app.user().create().await;
    let calls: Vec<_> = (0..100).map(|_| event(&user.id)).collect();
    let load = calls.iter().map(|event| {
        let call = start_recording(&app, event.clone());
        async move { call.await.unwrap() }
    });
    let load = tokio::spawn(futures_util::future::join_all(load));
    let booked = "SELECT count(*) FROM usage_records";
    eventually("some are booked", async || app.count(booked).await > 0).await;
    proxy.cut();
    let outcomes = load.await.unwrap();
    proxy.resume();
    let mut acknowledged = 0;
    for outcome in outcomes {
        match outcome {
            Ok(_) => acknowledged += 1,
            Err(status) => assert_database_unavailable(&status),
        }
    }
    assert!(app.count(booked).await >= acknowledged);
    for event in &calls {
        eventually("the retry succeeds", async || {
            app.record(event).await.is_ok()
        })
        .await;
    }
    app.assert_books_balance(100).await;
}

/// One call of each kind, all of which need the database.
async fn failures(app: &TestApp, user_id: &str, token: &str) -> Vec<Status> {
    let validate = ValidateTokenRequest {
        token: token.to_owned(),
        include_quota: true,
        ..ValidateTokenRequest::default()
    };
    let quota = CheckQuotaRequest {
        user_id: user_id.to_owned(),
        tokens: 1,
        ..CheckQuotaRequest::default()
    };
    let login = LoginRequest {
        identifier: app.admin_email.clone(),
        password: PASSWORD.to_owned(),
    };
    let (mut auth, mut usage) = (app.auth(&app.service_key), app.usage(&app.service_key));
    let me = GetCurrentUserRequest {};
    vec![
        auth.validate_token(validate).await.map(drop).unwrap_err(),
        usage.check_quota(quota).await.map(drop).unwrap_err(),
        app.record(&event(user_id)).await.unwrap_err(),
        app.auth("").login(login).await.map(drop).unwrap_err(),
        app.auth(token)
            .get_current_user(me)
            .await
            .map(drop)
            .unwrap_err(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_falls_silent_does_not_keep_the_ledger_waiting() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.database.statement_timeout = Duration::from_millis(300);
        settings.database.acquire_timeout = Duration::from_millis(500);
    })
    .await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    proxy.pause();
    let begun = Instant::now();
    let events: Vec<_> = (0..20).map(|_| event(&user.id)).collect();
    let calls: Vec<_> = events
        .iter()
        .map(|event| start_recording(&app, event.clone()))
        .collect();
    for call in calls {
        assert_database_unavailable(&call.await.unwrap().unwrap_err());
    }
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    proxy.resume();
    for event in &events {
        eventually("it is booked", async || app.record(event).await.is_ok()).await;
    }
    app.assert_books_balance(21).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dead_are_reaped_again_after_what_was_asked_of_the_database_got_lost() {
    let second = Duration::from_secs(1);
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.quota.replica_ttl = second;
        settings.quota.hold_horizon = second;
        settings.database.statement_timeout = second;
    })
    .await;
    let reaped = async || {
        app.sql(
            "INSERT INTO replicas (id, expires_at, holds_until)
             VALUES (gen_random_uuid(), now() - interval '1 hour', now() - interval '1 hour')",
        )
        .await;
        let dead = "SELECT count(*) FROM replicas WHERE expires_at < now() - interval '30 minutes'";
        eventually("it is reaped", async || app.count(dead).await == 0).await;
    };
    reaped().await;
    // Many a reaping begins meanwhile.
    proxy.lose();
    sleep(3 * second).await;
    proxy.resume();
    reaped().await;
}
