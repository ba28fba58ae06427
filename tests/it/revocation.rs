//! Memory speed, and forgetting in time: the change feed between replicas, and its failures.

use std::time::{Duration, Instant};

use tollkeeper::{
    auth::Trust, clock::BootTime, proto::tollkeeper::admin::v1::DisableServiceAccountRequest,
};
use tonic::Code;

use crate::harness::{TestApp, eventually, reason, validate_through};

const BOUND: Duration = Duration::from_millis(600);
const CALLS: usize = 100_000;

/// How long a replica gave answers that it should not give any more.
async fn lag(mut is_told: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    eventually("the replica hears of it", async || is_told().await).await;
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_revokes_the_others_refuse() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channel = replica.channel();
    let mut lags = Vec::new();
    for round in 0..10 {
        let user = app.user().create().await;
        let token = app.login(&user).await.access_token;
        let (service_id, key) = app
            .service(&format!("service-{round}"), &["tokens.validate"])
            .await;
        validate_through(&channel, &key, &token).await.unwrap();

        let tier = "builder";
        app.set_tier(&user.id, tier).await;
        lags.push(
            lag(async || validate_through(&channel, &key, &token).await.unwrap().tier == tier)
                .await,
        );

        let request = DisableServiceAccountRequest {
            service_account_id: service_id,
        };
        let mut admin = app.admin(&app.service_key);
        admin.disable_service_account(request).await.unwrap();
        lags.push(lag(async || validate_through(&channel, &key, &token).await.is_err()).await);

        let key = &app.service_key;
        if round % 2 == 0 {
            app.logout(&token).await;
        } else {
            app.disable(&user.id).await;
        }
        lags.push(lag(async || validate_through(&channel, key, &token).await.is_err()).await);

        let owner = app.user().create().await;
        let api_key = app.api_key(&owner, &[]).await;
        validate_through(&channel, key, &api_key.text)
            .await
            .unwrap();
        if round % 2 == 0 {
            app.revoke_api_key(&owner, &api_key.id).await;
        } else {
            app.disable(&owner.id).await;
        }
        let api_key = api_key.text;
        lags.push(lag(async || validate_through(&channel, key, &api_key).await.is_err()).await);
    }
    lags.sort();
    let trusts_memory = replica.auth.freshness().trust(BootTime::now()) == Trust::Live;
    assert!(trusts_memory, "every answer came from the database");
    let bound = tollkeeper::config::AuthSettings::default().staleness_bound;
    assert!(lags[lags.len() - 1] < bound, "{lags:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_table_is_heard_of() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    app.validate(&token).await.unwrap();
    app.sql("TRUNCATE sessions").await;
    eventually("the session is gone", async || {
        app.validate(&token).await.is_err()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_calls_need_no_database() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.auth.staleness_bound = Duration::from_secs(600);
        settings.auth.max_stale = Duration::from_secs(600);
    })
    .await;
    let token = app.login(&app.user().create().await).await.access_token;
    // Once heartbeats pass, answers are remembered.
    eventually("memory is trusted", async || {
        proxy.cut();
        let warm = app.validate(&token).await.is_ok();
        proxy.resume();
        let _ = app.validate(&token).await;
        warm
    })
    .await;
    let mut tokens = vec![token];
    for _ in 0..20 {
        tokens.push(app.login(&app.user().create().await).await.access_token);
    }
    for token in &tokens {
        app.validate(token).await.unwrap();
    }
    let reads = app.running().auth.counters().reads.get();
    let hits = app.running().auth.counters().hits.get();
    proxy.cut();
    // All of them while no statement can reach the database.
    let callers = (0..16).map(|caller| {
        let (channel, key, tokens) = (app.channel.clone(), app.service_key.clone(), tokens.clone());
        tokio::spawn(async move {
            for call in 0..CALLS / 16 {
                let token = &tokens[(caller + call) % tokens.len()];
                validate_through(&channel, &key, token).await.unwrap();
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    let counters = app.running().auth.counters();
    assert_eq!(counters.reads.get(), reads);
    assert_eq!(counters.hits.get() - hits, CALLS as u64);
    let unknown = app.validate("garbage").await.unwrap_err();
    assert_eq!(
        reason(&unknown),
        "CREDENTIAL_INVALID",
        "garbage does not reach the database"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feed_that_falls_silent_is_not_believed_beyond_the_bound() {
    let (app, proxy) =
        TestApp::spawn_behind_proxy(|settings| settings.auth.staleness_bound = BOUND).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    app.validate(&token).await.unwrap();
    proxy.pause_feed();
    app.sql(&format!(
        "UPDATE users SET is_active = false WHERE id = '{}'",
        user.id
    ))
    .await;
    let revoked = Instant::now();
    let mut last_accepted = Duration::ZERO;
    while revoked.elapsed() < BOUND * 4 {
        let asked = revoked.elapsed();
        if app.validate(&token).await.is_ok() {
            last_accepted = asked;
        }
    }
    assert!(
        last_accepted <= BOUND,
        "accepted {last_accepted:?} after the revocation"
    );

    // The database is still asked: what changes meanwhile is seen at once.
    app.sql(&format!(
        "UPDATE users SET is_active = true WHERE id = '{}'",
        user.id
    ))
    .await;
    app.validate(&token).await.unwrap();
    proxy.resume();
    app.sql(&format!(
        "UPDATE users SET is_active = false WHERE id = '{}'",
        user.id
    ))
    .await;
    eventually("the feed works again", async || {
        app.validate(&token).await.is_err()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_feed_and_database_memory_lasts_as_long_as_allowed() {
    let max_stale = Duration::from_secs(3);
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.auth.staleness_bound = BOUND;
        settings.auth.max_stale = max_stale;
        settings.database.acquire_timeout = Duration::from_millis(200);
    })
    .await;
    let token = app.login(&app.user().create().await).await.access_token;
    for _ in 0..50 {
        app.validate(&token).await.unwrap();
    }
    proxy.cut();
    let cut = Instant::now();
    let (mut last_accepted, mut refused) = (Duration::ZERO, None);
    while cut.elapsed() < max_stale + BOUND * 4 {
        let asked = cut.elapsed();
        match app.validate(&token).await {
            Ok(_) => last_accepted = asked,
            Err(status) => refused = Some(status),
        }
    }
    assert!(
        last_accepted > BOUND,
        "a good token was refused after {last_accepted:?} already"
    );
    assert!(
        last_accepted <= max_stale,
        "accepted {last_accepted:?} after the cut"
    );
    let refused = refused.expect("refused in the end");
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::Unavailable, "DATABASE_UNAVAILABLE")
    );
    proxy.resume();
    eventually("it recovers by itself", async || {
        app.validate(&token).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_wait_for_a_silent_database_wait_together() {
    let (app, proxy) =
        TestApp::spawn_behind_proxy(|settings| settings.auth.staleness_bound = BOUND).await;
    let user = app.user().create().await;
    let known = app.login(&user).await.access_token;
    let unknown = app.login(&user).await.access_token;
    // Heartbeats have passed by then: the caller's key stays in memory.
    tokio::time::sleep(BOUND).await;
    validate_through(&app.channel, &app.service_key, &known)
        .await
        .unwrap();
    proxy.pause();
    let asked = Instant::now();
    let calls = (0..12).map(|_| validate_through(&app.channel, &app.service_key, &unknown));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
    }
    assert!(asked.elapsed() < BOUND * 4, "{:?}", asked.elapsed());
    proxy.resume();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_deleted_takes_sessions_and_api_keys_along_on_every_replica() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let key = app.api_key(&user, &[]).await.text;
    let channels = [app.channel.clone(), replica.channel()];
    let service = &app.service_key;
    for (channel, auth) in channels.iter().zip([&app.running().auth, &replica.auth]) {
        for credential in [&token, &key] {
            eventually("it is in memory", async || {
                let hits = auth.counters().hits.get();
                let answer = validate_through(channel, service, credential).await;
                answer.is_ok() && auth.counters().hits.get() > hits
            })
            .await;
        }
    }
    let statement = format!("DELETE FROM users WHERE id = '{}'", user.id);
    app.sql(&statement).await;
    for channel in &channels {
        for (credential, why) in [(&token, "SESSION_ENDED"), (&key, "CREDENTIAL_INVALID")] {
            eventually("it is refused", async || {
                let answer = validate_through(channel, service, credential).await;
                answer.is_err_and(|refused| reason(&refused) == why)
            })
            .await;
        }
    }
}
