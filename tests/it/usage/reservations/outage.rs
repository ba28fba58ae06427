//! Reservations while Postgres is away, or silent.

use std::time::Duration;

use tokio::time::sleep;
use tollkeeper::proto::tollkeeper::usage::v1::{
    ReserveQuotaRequest, commit_reservation_response::Outcome, reserve_quota_request::Mode,
};
use tonic::Code;

use super::{Client, used, wish};
use crate::{
    harness::{Proxy, TestApp, eventually, hears_of_changes, reason},
    usage::quota::tiers_file,
};

/// A server behind a proxy, quick to notice that nothing comes through.
async fn behind_proxy() -> (TestApp, Proxy, tempfile::TempPath) {
    let tiers = tiers_file();
    let path = tiers.to_path_buf();
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.usage.tiers_file = path;
        settings.quota.replica_ttl = Duration::from_secs(2);
        settings.quota.recall_bound = Duration::from_secs(1);
        settings.database.statement_timeout = Duration::from_secs(2);
        settings.database.acquire_timeout = Duration::from_millis(500);
        settings.auth.staleness_bound = Duration::from_millis(500);
    })
    .await;
    hears_of_changes(app.running()).await;
    (app, proxy, tiers)
}

/// A look at what is admitted without the database.
fn look(user: &str, tokens: i64) -> ReserveQuotaRequest {
    ReserveQuotaRequest {
        mode: Mode::LookOnly.into(),
        ..wish(user, tokens)
    }
}

/// Waits until only the tier's policy admits anything.
async fn is_fenced(client: &Client, user: &str) {
    eventually("it is beyond the limit", async || {
        let looked = client.reserve(look(user, 1)).await;
        looked.is_ok_and(|looked| looked.beyond_limit)
    })
    .await;
}

/// Waits until the server has been heard of twice from now on.
async fn is_heard_of(app: &TestApp) {
    let heard = "SELECT (extract(epoch FROM max(expires_at)) * 1000)::bigint FROM replicas";
    for _ in 0..2 {
        let before = app.count(heard).await;
        eventually("it is heard of", async || app.count(heard).await > before).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_tier_admits_nothing_past_the_fence_and_a_commit_is_repeated() {
    let (app, proxy, _tiers) = behind_proxy().await;
    let client = Client::of(&app);
    let user = app.user().tier("small").create().await.id;
    let held = client.hold(&user, 60).await;
    proxy.pause();
    let failed = client.commit(&held, 25).await.unwrap_err();
    assert_eq!(failed.code(), Code::Unavailable);
    assert_eq!(reason(&failed), "DATABASE_UNAVAILABLE");
    eventually("nothing more is admitted", async || {
        let refused = client.reserve(wish(&user, 1)).await;
        refused.is_err_and(|status| reason(&status) == "DATABASE_UNAVAILABLE")
    })
    .await;
    proxy.resume();
    let mut committed = None;
    eventually("it is booked", async || {
        committed = client.commit(&held, 25).await.ok();
        committed.is_some()
    })
    .await;
    let outcome = committed.unwrap().outcome();
    assert!(
        [Outcome::Recorded, Outcome::Duplicate].contains(&outcome),
        "{outcome:?}"
    );
    let again = client.commit(&held, 25).await.unwrap();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    assert_eq!(used(&app, &user).await, 25);
    app.assert_books_balance(1).await;
    // The hold is over: 75 are left, and not more.
    eventually("the rest can be had", async || {
        client.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    eventually("all of it", async || {
        client.reserve(wish(&user, 15)).await.is_ok()
    })
    .await;
    let denied = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_tier_admits_its_allowance_and_what_was_used_is_booked_afterwards() {
    let (app, proxy, _tiers) = behind_proxy().await;
    let client = Client::of(&app);
    let user = app.user().tier("large").create().await.id;
    let before = client.hold(&user, 600).await;
    proxy.cut();
    is_fenced(&client, &user).await;
    let first = wish(&user, 30);
    let [first, again] = [
        client.reserve(first.clone()).await.unwrap(),
        client.reserve(first).await.unwrap(),
    ];
    for first in [&first, &again] {
        assert!(first.beyond_limit && first.quota.is_none());
        assert_eq!(first.tokens, 30);
    }
    let refused = client.reserve(wish(&user, 11)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(reason(&refused), "DATABASE_UNAVAILABLE");
    let second = client.reserve(wish(&user, 10)).await.unwrap();
    client.reserve(look(&user, 1)).await.unwrap_err();
    let released = client.release(&second.reservation).await;
    assert!(released.is_ok(), "{released:?}");
    // What was admitted is not admitted twice, whatever became of it.
    client.reserve(wish(&user, 10)).await.unwrap_err();
    for (reservation, tokens) in [
        (&first.reservation, 35),
        (&first.reservation, 35),
        (&second.reservation, 5),
        (&before, 500),
    ] {
        let accepted = client.commit(reservation, tokens).await.unwrap();
        assert_eq!(accepted.outcome(), Outcome::Accepted);
    }
    assert_eq!(app.running().usage.accepted_commits(), 4);
    proxy.resume();
    eventually("all is booked", async || used(&app, &user).await == 540).await;
    eventually("nothing waits", async || {
        app.running().usage.accepted_commits() == 0
    })
    .await;
    eventually("it is known to be booked", async || {
        let again = client.commit(&first.reservation, 35).await.unwrap();
        again.outcome() == Outcome::Duplicate
    })
    .await;
    assert_eq!(used(&app, &user).await, 540);
    app.assert_books_balance(3).await;
    eventually("the rest can be had", async || {
        client.reserve(wish(&user, 160)).await.is_ok()
    })
    .await;
    let denied = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
    // The next outage has an allowance of its own.
    is_heard_of(&app).await;
    proxy.cut();
    is_fenced(&client, &user).await;
    let anew = client.reserve(wish(&user, 40)).await.unwrap();
    assert!(anew.beyond_limit);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_meets_silence_is_accepted_in_an_open_tier() {
    let (app, proxy, _tiers) = behind_proxy().await;
    let client = Client::of(&app);
    let user = app.user().tier("large").create().await.id;
    let held = client.hold(&user, 60).await;
    // Nobody knows yet.
    proxy.pause();
    let accepted = client.commit(&held, 50).await.unwrap();
    assert_eq!(accepted.outcome(), Outcome::Accepted);
    proxy.resume();
    eventually("it is booked", async || used(&app, &user).await == 50).await;
    // While the server is not sure of the database it only accepts.
    eventually("it is known to be booked", async || {
        let again = client.commit(&held, 50).await.unwrap();
        again.outcome() == Outcome::Duplicate
    })
    .await;
    eventually("the rest can be had", async || {
        client.reserve(wish(&user, 650)).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_in_an_outage_waits_for_what_it_has_accepted() {
    let (app, proxy, _tiers) = behind_proxy().await;
    let user = app.user().tier("large").create().await.id;
    let replica = app.replica().await;
    // What it learns from now on stays good when the outage begins.
    hears_of_changes(&replica).await;
    let client = Client::of_replica(&app, &replica);
    let held = client.hold(&user, 60).await;
    proxy.cut();
    is_fenced(&client, &user).await;
    let accepted = client.commit(&held, 50).await.unwrap();
    assert_eq!(accepted.outcome(), Outcome::Accepted);
    let stopping = tokio::spawn(replica.stop());
    // The outage lasts, longer than a server without such commits would wait.
    sleep(Duration::from_secs(3)).await;
    assert!(!stopping.is_finished());
    proxy.resume();
    stopping.await.unwrap().unwrap();
    assert_eq!(used(&app, &user).await, 50);
}
