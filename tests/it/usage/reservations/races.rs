//! Calls at the same time, and calls that are cut short.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use tokio::time::sleep;
use tollkeeper::proto::tollkeeper::usage::v1::{
    ReserveQuotaRequest, commit_reservation_response::Outcome,
};
use tonic::Code;

use super::{Client, lasting, used, wish};
use crate::{
    harness::{Blocker, eventually, reason},
    usage::quota::with_tiers,
};

#[tokio::test(flavor = "multi_thread")]
async fn fifty_commits_of_one_reservation_through_two_servers_charge_once() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let clients = [Client::of(&app), Client::of_replica(&app, &replica)];
    let user = app.user().tier("small").create().await.id;
    let held = clients[0].hold(&user, 60).await;
    let commits = (0..50).map(|n| clients[n % 2].commit(&held, 20));
    let answers = join_all(commits).await.into_iter();
    let answers: Vec<_> = answers.map(Result::unwrap).collect();
    let ids: BTreeSet<&str> = answers.iter().map(|one| one.event_id.as_str()).collect();
    assert_eq!(ids.len(), 1);
    let recorded = answers.iter().map(|one| one.outcome());
    let (recorded, others): (Vec<_>, Vec<_>) = recorded.partition(|one| *one == Outcome::Recorded);
    assert_eq!(recorded.len(), 1);
    assert!(others.iter().all(|one| *one == Outcome::Duplicate));
    assert_eq!(used(&app, &user).await, 20);
    app.assert_books_balance(1).await;
    // The hold is over, once: 80 are left, and not more.
    for (client, tokens) in clients.iter().zip([60, 20]) {
        client.hold(&user, tokens).await;
    }
    for client in &clients {
        let refused = client.reserve(wish(&user, 1)).await.unwrap_err();
        assert_eq!(reason(&refused), "QUOTA_EXCEEDED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_repeated_while_it_is_under_way_holds_once() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("small").create().await.id;
    let request = wish(&user, 30);
    let all = join_all((0..30).map(|_| client.reserve(request.clone()))).await;
    let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
    assert!(all.iter().all(|one| one.tokens == 30));
    let quota = client.reserve(wish(&user, 10)).await.unwrap().quota;
    let quota = quota.unwrap();
    assert_eq!((quota.held_tokens, quota.remaining_tokens), (40, 100));
    let commits = join_all(all.iter().map(|one| client.commit(&one.reservation, 30))).await;
    let recorded = commits.into_iter().map(|one| one.unwrap().outcome());
    assert_eq!(recorded.filter(|one| *one == Outcome::Recorded).count(), 1);
    client.hold(&user, 60).await;
    let refused = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&refused), "QUOTA_EXCEEDED");
    assert_eq!(used(&app, &user).await, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_caller_went_away_is_booked_once_and_ends_its_reservation() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let clients = [Client::of(&app), Client::of_replica(&app, &replica)];
    for client in &clients {
        let user = app.user().tier("small").create().await.id;
        let held = clients[0].hold(&user, 60).await;
        // Only the ledger writes it.
        let blocker = Blocker::lock(&app, "usage_records").await;
        let commit = tokio::spawn({
            let (client, held) = (client.clone(), held.clone());
            async move { client.commit(&held, 25).await }
        });
        blocker.hold_up(&app, 1).await;
        commit.abort();
        assert!(commit.await.unwrap_err().is_cancelled());
        blocker.release().await;
        eventually("it is booked", async || used(&app, &user).await == 25).await;
        eventually("the rest can be had", async || {
            clients[1].reserve(wish(&user, 50)).await.is_ok()
        })
        .await;
        clients[0].hold(&user, 25).await;
        let over = clients[0].reserve(wish(&user, 1)).await.unwrap_err();
        assert_eq!(reason(&over), "QUOTA_EXCEEDED");
        let again = clients[0].commit(&held, 25).await.unwrap();
        assert_eq!(again.outcome(), Outcome::Duplicate);
        assert_eq!(used(&app, &user).await, 25);
    }
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_commits_whose_outcome_nobody_heard_the_one_that_is_booked_is_charged() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("small").create().await.id;
    let shortly = ReserveQuotaRequest {
        lifetime: lasting(2),
        ..wish(&user, 60)
    };
    let held = client.reserve(shortly).await.unwrap().reservation;
    for statement in [
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.output_tokens = 25 THEN
                 RAISE EXCEPTION USING ERRCODE = '40P01', MESSAGE = 'deadlock detected';
             END IF;
             PERFORM pg_sleep(1);
             RETURN NEW;
         END $$",
        "CREATE TRIGGER slow BEFORE INSERT ON usage_records
             FOR EACH ROW EXECUTE FUNCTION slow()",
    ] {
        app.sql(statement).await;
    }
    let first = client.commit(&held, 25).await.unwrap_err();
    assert_eq!(first.code(), Code::Unavailable);
    let second = {
        let (client, held) = (client.clone(), held.clone());
        tokio::spawn(async move { client.commit(&held, 60).await })
    };
    sleep(Duration::from_millis(400)).await;
    second.abort();
    assert!(second.await.unwrap_err().is_cancelled());
    eventually("it is booked", async || used(&app, &user).await == 60).await;
    app.sql("DROP TRIGGER slow ON usage_records").await;
    // The first one is a conflict now, and the hold is over by its time too.
    sleep(Duration::from_secs(3)).await;
    assert_eq!(used(&app, &user).await, 60);
    let refused = client.reserve(wish(&user, 41)).await.unwrap_err();
    assert_eq!(reason(&refused), "QUOTA_EXCEEDED");
    client.hold(&user, 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_whose_rows_cannot_be_read_keeps_nobody_else_from_quota() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let broken = app.user().tier("small").create().await.id;
    client.hold(&broken, 10).await;
    // Written by hand.
    app.sql(&format!(
        "INSERT INTO quota_overrides (user_id, monthly_tokens, expires_at, reason, actor_kind)
         VALUES ('{broken}', 1000, 'infinity', 'by hand', 'operator')"
    ))
    .await;
    for _ in 0..5 {
        // Each wants a lease, beside the one that is asked for in vain again and again.
        let other = app.user().tier("small").create().await.id;
        client.hold(&other, 60).await;
        sleep(Duration::from_millis(200)).await;
    }
}
