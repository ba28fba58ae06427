//! What is refused, and what a refusal leaves behind.

use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tollkeeper::proto::tollkeeper::usage::v1::{
    CommitReservationRequest, ReserveQuotaRequest, commit_reservation_response::Outcome,
    reserve_quota_request::Mode,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::{Client, used, wish};
use crate::{
    harness::{TestApp, eventually, hears_of_changes, reason},
    usage::{quota::with_tiers, tokens, use_up},
};

/// Reservations that one user may have.
const MOST: usize = 10_000;

/// An error of every reason that only reservations have.
pub(crate) async fn refused_reservations() -> Vec<Status> {
    let (app, _tiers) = with_tiers().await;
    hears_of_changes(app.running()).await;
    let client = Client::of(&app);
    let small = app.user().tier("small").create().await.id;
    let mut errors = vec![client.reserve(wish(&small, 61)).await.unwrap_err()];
    client.hold(&small, 60).await;
    errors.push(client.reserve(wish(&small, 50)).await.unwrap_err());
    errors.push(client.commit("garbage", 1).await.unwrap_err());
    let large = app.user().tier("large").create().await.id;
    let held = client.hold(&large, 1).await;
    client.commit(&held, 1).await.unwrap();
    errors.push(client.release(&held).await.unwrap_err());
    let holds = (0..40).map(|_| client.reserve(wish(&large, 1)));
    let limited = stream::iter(holds).buffered(8).try_collect::<Vec<_>>();
    errors.push(limited.await.unwrap_err());
    let open = app.user().tier("open").create().await.id;
    fill(&client, &open).await;
    errors.push(client.reserve(wish(&open, 1)).await.unwrap_err());
    errors
}

/// Holds as much as may be at a time; answers one of the reservations.
async fn fill(client: &Client, user: &str) -> String {
    let holds = (0..MOST).map(|_| client.hold(user, 1));
    let mut holds = stream::iter(holds).buffer_unordered(64);
    let mut last = String::new();
    while let Some(held) = holds.next().await {
        last = held;
    }
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_holds_ten_thousand_reservations_at_most() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("open").create().await.id;
    let one = fill(&client, &user).await;
    let refused = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&refused), "TOO_MANY_RESERVATIONS");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let retry = refused.get_details_retry_info().unwrap();
    assert!(retry.retry_delay.unwrap() > Duration::ZERO);
    // Nobody else is.
    let other = app.user().tier("open").create().await.id;
    client.hold(&other, 1).await;
    client.commit(&one, 1).await.unwrap();
    client.hold(&user, 1).await;
    let refused = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&refused), "TOO_MANY_RESERVATIONS");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_held_for_nobody() {
    let app = TestApp::spawn().await;
    let client = Client::of(&app);
    let nobody = Uuid::now_v7().to_string();
    for mode in [Mode::AllOrNothing, Mode::BestEffort, Mode::LookOnly] {
        let request = ReserveQuotaRequest {
            mode: mode.into(),
            ..wish(&nobody, 1)
        };
        let refused = client.reserve(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);
        assert_eq!(reason(&refused), "USER_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_user_gets_nothing_more_and_what_was_used_is_booked() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let clients = [Client::of(&app), Client::of_replica(&app, &replica)];
    let [here, there] = &clients;
    let user = app.user().tier("small").create().await.id;
    let (first, second) = (here.hold(&user, 30).await, here.hold(&user, 30).await);
    let third = here.hold(&user, 30).await;
    app.disable(&user).await;
    for client in &clients {
        eventually("it is heard of", async || {
            let refused = client.reserve(wish(&user, 1)).await;
            refused.is_err_and(|status| reason(&status) == "ACCOUNT_DISABLED")
        })
        .await;
        let refused = client.extend(&first, 600).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert_eq!(reason(&refused), "ACCOUNT_DISABLED");
    }
    let booked = here.commit(&first, 20).await.unwrap();
    assert_eq!(booked.outcome(), Outcome::Recorded);
    let booked = there.commit(&second, 20).await.unwrap();
    assert_eq!(booked.outcome(), Outcome::Recorded);
    there.release(&third).await.unwrap();
    assert_eq!(used(&app, &user).await, 40);
    app.enable(&user).await;
    eventually("the rest can be had", async || {
        here.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_cannot_be_counted_leaves_the_reservation_as_it_was() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("open").create().await.id;
    let held = client.hold(&user, 5).await;
    use_up(&app, &user, "a-model").await;
    let request = CommitReservationRequest {
        reservation: held.clone(),
        tokens: tokens(1_000_000),
        ..CommitReservationRequest::default()
    };
    let mut usage = app.usage(&app.service_key);
    let refused = usage.commit_reservation(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);
    assert_eq!(reason(&refused), "TOTAL_OUT_OF_RANGE");
    client.extend(&held, 600).await.unwrap();
    let booked = client.commit(&held, 5).await.unwrap();
    assert_eq!(booked.outcome(), Outcome::Recorded);
}
